"""One cell of the table: a method trains a tiny model of a family, ranks move, and plain PEFT computes the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lorank
from lorank.errors import LorankError
from lorank.scoring.loss import loss_of
from lorank.testing import plain_peft
from tests.families.family import Family

STEPS, START, BUDGET = 10, 6, 5
# By the number of adapted modules.
METHODS: dict[str, Callable[[int], lorank.Allocator]] = {
    "ALoRA": lambda modules: lorank.ALoRA(k1=3, k2=2, rounds=3, unit="steps", per_round=modules, budget=BUDGET),
    "ARD-LoRA": lambda _: lorank.ARDLoRA(alpha_lr=0.08, l1=0.05, resize_every=2, hold=1, budget=BUDGET),
    "BalancedLoRA": lambda _: lorank.BalancedLoRA(wide=2, cuts=2, until=0.6, budget=BUDGET),
}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Result:
    """What a cell has shown.

    Args:
        says: ``yes``, or ``refused: `` and lorank's reason.
        difference: between the live model's outputs and those of plain PEFT in another process, the largest.
    """

    says: str
    difference: float = 0.0


def try_cell(family: Family, method: str) -> Result:
    """Trains, saves, reloads and compares.

    Raises:
        AssertionError: the cell is silently wrong: what it says names how.
    """
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(7)
        try:
            model, ranks = _train(family, method, Path(scratch))
        except LorankError as error:
            return Result(f"refused: {error}")
        _check_ranks(ranks, family.parts)
        return Result("yes", _compare(family, model, ranks, Path(scratch)))


def _train(family: Family, method: str, scratch: Path) -> tuple[nn.Module, lorank.Ranks]:
    base = family.make()
    inner = base if family.inner is None else family.inner(base)
    if hasattr(inner, "save_pretrained"):
        inner.save_pretrained(scratch / "base")
    else:
        (scratch / "base").mkdir()
        torch.save(inner.state_dict(), scratch / "base" / "weights.pt")
    config = LoraConfig(r=START, lora_alpha=2 * START, target_modules=family.modules, **family.lora)
    if family.inner is None:
        model: nn.Module = get_peft_model(base, config)
    else:
        inner.add_adapter(config)
        model = base
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)
    batches = [family.batch(4) for _ in range(2)]
    ranks = lorank.attach(
        model,
        optimizer,
        METHODS[method](len(lorank.find_layers(model))),
        validation_batch=family.batch(4),
        train_batches=batches,
        loss_fn=family.loss_fn,
        total_steps=STEPS,
    )
    losses = []
    while ranks.step < STEPS:
        batch = family.batch(4)
        loss = loss_of(model(**batch), batch) if family.loss_fn is None else family.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert min(losses[1:]) < losses[0], f"nothing was learnt: {losses}"
    return model, ranks


def _check_ranks(ranks: lorank.Ranks, parts: tuple[str, ...]) -> None:
    """Ranks have moved, in each part of the model, differ, and fit the budget."""
    first, last = ranks.history[0].ranks, ranks.layers.ranks
    assert ranks.finished
    assert ranks.budget is not None
    assert ranks.budget.fits(last), f"{sum(last.values())} ranks do not fit the budget"
    assert first != last, "the ranks are as before"
    assert len(last) == 1 or len(set(last.values())) > 1, "all modules have the same rank"
    for part in parts:
        own = {name: layer for name, layer in ranks.layers.items() if part in name}
        assert any(len({record.ranks[name] for record in ranks.history}) > 1 for name in own), (
            f"no rank of {part} moved"
        )
        assert any(layer.B.any() for layer in own.values()), f"no adapter in {part} was trained"


def _compare(family: Family, model: nn.Module, ranks: lorank.Ranks, scratch: Path) -> float:
    """The largest difference of the outputs in a process with plain PEFT."""
    model.eval()
    base, batch = ranks.layers.model, _inputs(model, family.batch(3))
    with torch.no_grad():
        live = base(**batch)[family.output]
        with _adapter_off(base):
            without = base(**batch)[family.output]
    assert (live - without).abs().max() > 100 * TOLERANCE, "the adapter changes nothing"
    lorank.save_adapter(ranks.layers, scratch / "adapter")
    inner = base.get_base_model() if isinstance(base, PeftModel) else base
    auto = family.auto or type(inner).__name__
    found = plain_peft().logits(scratch / "base", scratch / "adapter", batch, auto, family.output)
    difference = float((found["logits"] - live).abs().max())
    assert difference < TOLERANCE, f"plain PEFT computes something else: {difference:.2e}"
    merged = float((found["merged"] - live).abs().max())
    assert merged < 1e-4, f"the merged model computes something else: {merged:.2e}"
    return difference


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:  # a transformers model, to which the adapter was added
        model.disable_adapters()
        yield
        model.enable_adapters()


def _inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch without labels; the labels of an encoder–decoder become its decoder's inputs."""
    config = getattr(model, "config", None)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if getattr(config, "is_encoder_decoder", False) and batch["labels"].dim() == 2:
        inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
    return inputs
