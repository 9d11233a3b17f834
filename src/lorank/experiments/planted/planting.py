"""Drawing planted updates: their modules or heads, ranks and directions (see `problem.py`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorank.config.sections import ModelSettings
from lorank.experiments.models import load_tokenizer, resolve
from lorank.lora import HeadGroups, find_layers, head_groups, make_peft_model
from lorank.tasks.sources import load_rows

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def tiny_blocks(count: int) -> PreTrainedModel:
    """The first blocks of the packaged tiny Llama, with its final norm and embeddings; frozen, in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    inner = model.base_model
    inner.layers = cast(nn.ModuleList, inner.layers)[:count]
    model.config.num_hidden_layers = count
    model.requires_grad_(False).train(False)
    return model


def targets(model: PreTrainedModel, where: Literal["modules", "heads"]) -> tuple[list[str], dict[str, HeadGroups]]:
    """The adapted modules, in the model's order, and for ``heads`` the attention heads of each module."""
    chosen = "all-linear" if where == "modules" else list(ATTENTION)
    layers = find_layers(make_peft_model(copy.deepcopy(model), r=1, target_modules=chosen))
    return list(layers), head_groups(layers) if where == "heads" else {}


@lru_cache
def _tokens_of(split: str) -> Tensor:
    """One split of Python's reference manual, (tokens,)."""
    tokenizer = load_tokenizer(ModelSettings(name="tiny"))
    text = "\n".join(str(row["text"]) for row in load_rows("python_reference", split))
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def draw_tokens(
    parts: Mapping[str, str], counts: Mapping[str, int], block: int, draw: torch.Generator
) -> dict[str, Tensor]:
    """Draws blocks of Python's reference manual, (samples, block) per part.

    Args:
        parts: per part, the split to draw from. Parts of the same split share no block.
        counts: samples per part.
        block: tokens per sample.
        draw: the generator.
    """
    drawn: dict[str, Tensor] = {}
    for split in dict.fromkeys(parts.values()):
        ids = _tokens_of(split)
        blocks = ids[: len(ids) // block * block].view(-1, block)  # (all, block)
        order, used = torch.randperm(len(blocks), generator=draw), 0
        for part in (name for name, of in parts.items() if of == split):
            drawn[part] = blocks[order[used : used + counts[part]]]
            used += counts[part]
    return drawn


@dataclass(frozen=True)
class Place:
    """A place for one update: a module, or one head of a module.

    Attributes:
        module: the module's name.
        rows: the outputs of the update: a head's outputs, or all.
        columns: the inputs of the update: a head's inputs, or all.
        head: the number of the head; None: the whole module.
    """

    module: str
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    head: int | None = None


def draw_places(
    names: Sequence[str], heads: Mapping[str, HeadGroups], planted: float, draw: torch.Generator
) -> list[tuple[list[Place], int]]:
    """For every group of candidates: the candidates in random order, and how many of them get an update.

    Without heads, all modules form one group, and the fraction ``planted`` of them gets an update. With heads, every
    module is a group. The number of its heads with an update is drawn uniformly from zero to twice that fraction, so
    that modules differ.
    """
    if not heads:
        order = torch.randperm(len(names), generator=draw).tolist()
        return [([Place(names[i]) for i in order], round(planted * len(names)))]
    groups = []
    for name in names:
        kind, count = heads[name].kind, heads[name].count
        share = min(1.0, 2 * planted * float(torch.rand((), generator=draw)))
        places = []
        for head in torch.randperm(count, generator=draw).tolist():
            span = heads[name].span(head)
            places.append(Place(name, rows=span, head=head) if kind == "rows" else Place(name, columns=span, head=head))
        groups.append((places, round(share * count)))
    return groups


def moments(model: PreTrainedModel, names: Sequence[str], tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Per module, over all tokens: C = E[x xᵀ], (d_in, d_in) float64, and the root mean square norm of the output."""
    covariance: dict[str, Tensor] = {}
    length: dict[str, float] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()  # (n · T, d_in)
            covariance[name] = x.T @ x / len(x)
            length[name] = float(output.double().square().sum(-1).mean().sqrt())

        return model.get_submodule(name).register_forward_hook(see)

    handles = [watch(name) for name in names]
    model.base_model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return covariance, length


def draw_update(shape: tuple[int, ...], place: Place, rank: int, basis: Tensor | None, draw: torch.Generator) -> Tensor:
    """Draws an update U G Vᵀ, (d_out, d_in) float64; U and G are random, with orthonormal columns and rows.

    Args:
        shape: (d_out, d_in).
        place: the rows and columns of the update; everything else is zero.
        rank: r, at most the number of rows and at most k.
        basis: V, (columns, k), the input directions of the update; None: all inputs equally (the identity).
        draw: the generator.
    """
    update = torch.zeros(shape, dtype=torch.float64)
    rows, columns = update[place.rows, place.columns].shape
    U = torch.linalg.qr(torch.randn(rows, rank, generator=draw, dtype=torch.float64)).Q  # (rows, r)
    k = columns if basis is None else basis.shape[1]
    G = torch.linalg.qr(torch.randn(k, rank, generator=draw, dtype=torch.float64)).Q  # (k, r)
    update[place.rows, place.columns] = U @ (G if basis is None else basis @ G).T
    return update


def whitened(covariance: Tensor, most: int) -> Tensor:
    """Q Λ^(−1/2) of the main components of the inputs, (columns, k). Along each one, the inputs have mean square 1.

    Args:
        covariance: (columns, columns).
        most: k; with fewer columns, k is their number.
    """
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    k = min(most, len(values))
    return cast(Tensor, vectors[:, -k:] / values[-k:].sqrt())


def root(covariance: Tensor) -> Tensor:
    """C^(1/2), the symmetric square root, (d_in, d_in)."""
    values, vectors = torch.linalg.eigh(covariance)
    made: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return made


def scale_for(wanted: float, guess: float, measure: Callable[[float], float], steps: int = 4) -> float:
    """Finds c with measure(c) = wanted, for a measure that grows about as c². Each step multiplies c by the square root
    of wanted / measure(c).

    Args:
        wanted: the target value, > 0.
        guess: the first c, > 0.
        measure: the measure.
        steps: number of steps.
    """
    c = guess
    for _ in range(steps):
        c *= math.sqrt(wanted / measure(c))
    return c
