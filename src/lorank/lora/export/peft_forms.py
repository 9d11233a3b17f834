"""The three forms of an adapter that PEFT reads. They differ in where the factor s of a module's update stands.

    peft       s_m = alpha_m / r_m     as lorank saves it: rank_pattern and alpha_pattern, A and B as they were trained
    tight      s_m = 1 / r_m           rank_pattern only, lora_alpha = 1, B' = s_m r_m B
    uniform    s = 1                   one rank r and alpha = r for all modules, no patterns, B' = s_m B, zeros up to r

``tight`` is right wherever a program divides one alpha by the rank of the tensor itself, and in PEFT. ``uniform`` is
right wherever a program knows one rank and one alpha. Zeros in A and B change no output.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from torch import Tensor

from lorank.errors import AdapterError
from lorank.lora.export.adapter_file import PREFIX, AdapterFile, Update, stored_dtype
from lorank.lora.export.base_modules import BaseModule
from lorank.lora.rank_zero import stated_entries
from lorank.lora.scaling import alpha_for

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM accepts as ``max_lora_rank``, from 8 on."""
_LAYER = re.compile(r".*?\.\d+(?=\.)")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that servers compute as one: SGLang expects a LoRA in all of them, or in none."""


@dataclass(frozen=True)
class PeftForm:
    """An adapter as PEFT reads it.

    Attributes:
        config: its settings.
        tensors: its weights, by PEFT's keys.
        notes: what the user should know about it.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def peft_form(adapter: AdapterFile, dtype: torch.dtype | None = None) -> PeftForm:
    """A and B as they are, and the rank and alpha of every module under its full name.

    Args:
        dtype: of A and B; None: as they are.
    """
    config = _with_ranks(adapter, adapter.ranks)
    alphas = {name: alpha_for(one.scaling, one.rank, config.use_rslora) for name, one in adapter.updates.items()}
    config.lora_alpha, config.alpha_pattern = _with_exceptions(alphas)
    return PeftForm(config, _tensors(adapter, _cast(adapter.updates, dtype)))


def tight_form(adapter: AdapterFile, dtype: torch.dtype | None = None) -> PeftForm:
    """One alpha, 1, for all modules; s · r is in B.

    Args:
        dtype: of A and B; None: as they are, or float32 where the new B would have to be rounded in half precision.
    """
    config = _with_ranks(adapter, adapter.ranks)
    config.lora_alpha, config.alpha_pattern, config.use_rslora = 1, {}, False
    folded, notes = fold(adapter, {name: one.scaling * one.rank for name, one in adapter.updates.items()}, dtype)
    return PeftForm(config, _tensors(adapter, folded), notes)


def uniform_form(
    adapter: AdapterFile,
    dtype: torch.dtype | None = None,
    *,
    rank: int | None = None,
    base: Mapping[str, BaseModule] | None = None,
) -> PeftForm:
    """One rank and no patterns; modules without ranks of their own are filled with zeros.

    Args:
        dtype: see :func:`tight_form`.
        rank: the rank of all modules; None: the smallest of :data:`SERVED_RANKS` that holds every module.
        base: the base model's modules; None: not known. Then modules are filled only in layers and of projections that
            the adapter names.

    Raises:
        AdapterError: the adapter holds more than plain LoRA; or a module has more ranks.
    """
    check_uniform(adapter)
    chosen = rank_for(adapter, rank)
    folded, notes = fold(adapter, {name: one.scaling for name, one in adapter.updates.items()}, dtype)
    padded = {name: _padded(one, chosen) for name, one in folded.items()}
    absent, note = absent_modules(adapter, base)
    like = next(iter(padded.values())).A
    for name, module in absent.items():
        padded[name] = _zeros(module, chosen, like.dtype)
    config = _with_ranks(adapter, dict.fromkeys(padded, chosen))
    config.lora_alpha, config.alpha_pattern, config.use_rslora = chosen, {}, False
    config.target_modules = _short_names(padded, base)
    if base is not None:
        adapter.check_sizes({name: module.d_in for name, module in base.items() if module.is_embedding})
    return PeftForm(config, _tensors(replace(adapter, others={}), padded), (*notes, *note))


def check_uniform(adapter: AdapterFile) -> None:
    """Raises AdapterError if no program that needs the form ``uniform`` reads what the adapter holds."""
    check_plain(adapter, "uniform")
    convolution = next((name for name, one in adapter.updates.items() if one.is_convolution), None)
    if convolution is not None:
        raise AdapterError(
            f"{convolution} is a convolution, which no program that needs the form 'uniform' adapts. "
            "Use --form diffusers or --form comfyui"
        )


def rank_for(adapter: AdapterFile, rank: int | None = None) -> int:
    """The rank of the form ``uniform``.

    Raises:
        AdapterError: a module has more ranks than ``rank``, or than any program serves.
    """
    largest = max(adapter.ranks.values())
    if rank is not None:
        if rank < largest:
            raise AdapterError(
                f"rank {rank} is below the largest rank of a module, {largest}: give at least {largest}, or make the "
                f"adapter smaller first (lorank resize … --max-lora-rank {rank}, or lorank prune)"
            )
        return rank
    fitting = [served for served in SERVED_RANKS if served >= largest]
    if not fitting:
        raise AdapterError(
            f"a module has rank {largest}, and programs that want one rank serve at most {SERVED_RANKS[-1]}: make the "
            f"adapter smaller first (lorank resize … --max-lora-rank {SERVED_RANKS[-1]}, or lorank prune), or use "
            "--form merged"
        )
    return fitting[0]


def check_plain(adapter: AdapterFile, form: str, instead: str = "merged") -> None:
    """Raises AdapterError if the adapter holds more than A and B of its modules."""
    found = adapter.beside_lora
    if found:
        only_peft = adapter.other_forward not in (None, "DoRA")
        raise AdapterError(
            f"the form {form!r} holds A and B of plain LoRA only, and the adapter in {adapter.folder} also has "
            f"{' and '.join(found)}. "
            + ("Serve it with PEFT (--form peft)" if only_peft else f"Use --form {instead}, or serve it with PEFT")
        )


def fold(
    adapter: AdapterFile, factors: Mapping[str, float], dtype: torch.dtype | None
) -> tuple[dict[str, Update], tuple[str, ...]]:
    """Multiplies every B by a factor; s becomes s / factor, so that the update stays.

    Returns:
        The updates and notes for the user. All A and B have one dtype: ``dtype``; or None: the one that they have, but
        float32 where a product cannot be held exactly in half precision.
    """
    stored = stored_dtype(adapter)
    notes: tuple[str, ...] = ()
    chosen = dtype or folded_dtype(adapter, factors.values())
    if dtype is None and chosen != stored:
        notes = (
            f"A and B are written as float32, because s times B is not exact in {_name(stored)}; "
            f"--dtype {_name(stored)} rounds it",
        )
    folded = {
        name: replace(
            one,
            A=one.A.to(chosen),
            B=(one.B.double() * factors[name]).to(chosen),
            bias=None if one.bias is None else (one.bias.double() * factors[name]).to(chosen),
            scaling=one.scaling / factors[name] if factors[name] else 0.0,
        )
        for name, one in adapter.updates.items()
    }
    if not all(bool(one.B.isfinite().all()) for one in folded.values()):
        raise AdapterError(f"s times B is too large for {_name(chosen)}: give --dtype float32")
    return folded, notes


def folded_dtype(adapter: AdapterFile, factors: Iterable[float]) -> torch.dtype:
    """The adapter's dtype; float32 if it is a half precision in which B times one of the factors is not exact."""
    stored = stored_dtype(adapter)
    is_exact = torch.finfo(stored).bits >= 32 or all(map(_is_power_of_two, factors))
    return stored if is_exact else torch.float32


def absent_modules(
    adapter: AdapterFile, base: Mapping[str, BaseModule] | None
) -> tuple[dict[str, BaseModule], tuple[str, ...]]:
    """The modules that ``uniform`` fills with zeros: those without a LoRA, of projections that have one in other
    layers, or that servers compute together with one that has one.

    Args:
        base: the base model's modules, or None. Then shapes are those of other layers.

    Returns:
        The modules, and notes for the user.
    """
    present = {
        name: BaseModule(one.A.shape[1], one.B.shape[0], one.is_embedding) for name, one in adapter.updates.items()
    }
    kinds = {together for name in (*present, *adapter.empty) for together in _computed_together(kind_of(name))}
    if base is not None:
        return {name: one for name, one in base.items() if kind_of(name) in kinds and name not in present}, ()
    shapes = {kind_of(name): module for name, module in present.items()}
    layers = {match[0] for name in (*present, *adapter.empty) if (match := _LAYER.match(name))}
    found = {
        layer + kind.removeprefix(kind_of(layer)): shape
        for layer in layers
        for kind, shape in shapes.items()
        if kind.startswith(f"{kind_of(layer)}.") and "*" not in kind.removeprefix(kind_of(layer))
    }
    unknown = sorted(kinds - set(shapes))
    notes = (
        "the base model's configuration was not found. Modules without a LoRA are filled with zeros only in layers "
        f"that the adapter names{f', and not {unknown[0]}' if unknown else ''}: give --base to fill all",
    )
    return {name: shape for name, shape in found.items() if name not in present}, notes


def _computed_together(kind: str) -> set[str]:
    parent, _, last = kind.rpartition(".")
    return {f"{parent}.{other}" for group in _FUSED if last in group for other in group} | {kind}


def kind_of(name: str) -> str:
    """The name of a module with ``*`` for numbers: equal for the same projection of all layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _with_ranks(adapter: AdapterFile, ranks: Mapping[str, int]) -> LoraConfig:
    config = copy.copy(adapter.config)
    config.r, config.rank_pattern = _with_exceptions(ranks)
    config.layers_to_transform = config.layers_pattern = None
    config.target_modules = stated_entries(set(ranks), adapter.settings.get("target_modules"))
    config.init_lora_weights, config.inference_mode = True, True
    config.eva_config = None
    return config


def _with_exceptions(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and the others under the names of their modules, which match nothing else."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _tensors(adapter: AdapterFile, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    tensors = {}
    for name, one in updates.items():
        key = f"{PREFIX}{name}.lora_"
        if one.is_embedding:
            tensors[f"{key}embedding_A"], tensors[f"{key}embedding_B"] = one.A, one.B
        else:
            tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = one.A, one.B
        if one.magnitude is not None:
            tensors[f"{key}magnitude_vector"] = one.magnitude
        if one.bias is not None:
            tensors[f"{key}B.bias"] = one.bias
    return {key: value.contiguous() for key, value in {**tensors, **adapter.others}.items()}


def _cast(updates: Mapping[str, Update], dtype: torch.dtype | None) -> Mapping[str, Update]:
    if dtype is None:
        return updates
    return {name: replace(one, A=one.A.to(dtype), B=one.B.to(dtype)) for name, one in updates.items()}


def _padded(one: Update, rank: int) -> Update:
    more = rank - one.rank
    A = torch.cat([one.A, one.A.new_zeros(more, one.A.shape[1])], 0)  # (rank, d_in)
    B = torch.cat([one.B, one.B.new_zeros(len(one.B), more)], 1)  # (d_out, rank)
    return replace(one, A=A, B=B)


def _zeros(module: BaseModule, rank: int, dtype: torch.dtype) -> Update:
    A, B = torch.zeros(rank, module.d_in, dtype=dtype), torch.zeros(module.d_out, rank, dtype=dtype)
    return Update(A, B, 1.0, module.is_embedding)


def _short_names(filled: Iterable[str], base: Mapping[str, BaseModule] | None) -> set[str]:
    """The last parts of the names, as servers expect them, if they name no other module; else the full names."""
    names = set(filled)
    last = {name.rpartition(".")[2] for name in names}
    if base is not None and any(name.rpartition(".")[2] in last and name not in names for name in base):
        return names
    return last


def _is_power_of_two(value: float) -> bool:
    return value == 0 or abs(math.frexp(value)[0]) == 0.5


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
