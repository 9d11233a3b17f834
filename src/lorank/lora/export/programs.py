"""Where an adapter loads as it is, in which form it loads elsewhere, what that costs, and why not otherwise.

Each rule is what a program's own loading code does with the files. docs/serving.md says which versions were run, and
which were only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorank.errors import LorankError
from lorank.lora.export.adapter_file import AdapterFile, read_adapter_file, stored_dtype
from lorank.lora.export.base_modules import BaseModule, base_config, base_modules
from lorank.lora.export.diffusion import check_diffusion, component_of
from lorank.lora.export.gguf_file import check_gguf
from lorank.lora.export.mlx import check_mlx
from lorank.lora.export.peft_forms import SERVED_RANKS, absent_modules, check_uniform, folded_dtype, rank_for

Rule = Callable[[AdapterFile], str | None]


@dataclass(frozen=True)
class Program:
    """A program that serves adapters.

    Attributes:
        name: its name.
        forms: the forms that it reads, the cheapest first.
        problem: why it does not read an adapter's folder as PEFT writes it; None: it reads it.
        kind: the models that it serves: language or image; any: both.
        too_much: what the adapter holds that it reads in no form but ``merged``; None: all but plain LoRA.
    """

    name: str
    forms: tuple[str, ...]
    problem: Rule
    kind: str = "language"
    too_much: Rule | None = None


@dataclass(frozen=True)
class Place:
    """One line of the table: a program and this adapter.

    Attributes:
        program: its name.
        as_it_is: whether it reads the adapter as it is, with the right outputs.
        why_not: the reason, if it does not.
        form: the form to export; ``None``: none is needed, or there is none.
        bytes: the size of A and B there; None: of the whole model.
        padding: this size over that of the adapter's own A and B, with the same dtype; 1: no padding.
        problems: why cheaper forms that the program reads cannot hold the adapter.
    """

    program: str
    as_it_is: bool
    why_not: str | None
    form: str | None
    bytes: int | None
    padding: float | None
    problems: tuple[str, ...]


def places(adapter: str | Path, base: str | None = None) -> list[Place]:
    """Where an adapter loads.

    Args:
        adapter: the folder of a plain PEFT LoRA adapter.
        base: the folder or hub name of its base model; None: the one that the adapter names, if it is on this machine.

    Raises:
        AdapterError: the adapter cannot be read.
    """
    read = read_adapter_file(adapter)
    config = base_config(read, base, download=base is not None)
    modules = base_modules(read, config)
    return [_place(program, read, config, modules) for program in PROGRAMS]


def _place(
    program: Program, adapter: AdapterFile, config: Any | None, modules: Mapping[str, BaseModule] | None
) -> Place:
    kind = "language" if problem_of("diffusers", adapter, None) else "image"
    if program.kind not in (kind, "any"):
        return Place(program.name, False, f"it serves {program.kind} models", None, None, None, ())
    too_much = (program.too_much or _plain)(adapter)
    why_not = too_much or program.problem(adapter)
    if why_not is None:
        return Place(program.name, True, None, None, _bytes("peft", adapter, modules), 1.0, ())
    problems: list[str] = []
    for form in program.forms:
        problem = too_much if form in ("tight", "uniform") else None
        problem = problem or problem_of(form, adapter, config)
        if problem is None:
            size = _bytes(form, adapter, modules)
            padding = None if size is None else size / (adapter.numbers * _dtype(form, adapter).itemsize)
            return Place(program.name, False, why_not, form, size, padding, tuple(problems))
        if problem != why_not:
            problems.append(problem)
    return Place(program.name, False, why_not, None, None, None, tuple(dict.fromkeys(problems)))


def problem_of(form: str, adapter: AdapterFile, config: Any | None) -> str | None:
    """Why a form cannot hold an adapter; None: it can.

    Args:
        config: the configuration of the base model, or None.
    """
    try:
        if form == "uniform":
            check_uniform(adapter)
            rank_for(adapter)
        elif form == "gguf":
            check_gguf(adapter, config)
        elif form == "mlx":
            check_mlx(adapter, config)
        elif form in ("diffusers", "comfyui"):
            component_of(adapter)
            check_diffusion(adapter, form)
        elif form == "merged" and adapter.other_forward in ("Activated LoRA", "Arrow", "QA-LoRA"):
            return f"{adapter.other_forward} cannot be merged: serve it with PEFT"
        elif form == "merged" and getattr(config, "quantization_config", None) is not None:
            return "the base model is quantised: merge into the model in full precision (--base)"
    except LorankError as error:
        return str(error)
    return None


def _dtype(form: str, adapter: AdapterFile) -> torch.dtype:
    if form == "gguf":
        return torch.float32
    if form == "peft":
        return stored_dtype(adapter)
    by_rank = form in ("tight", "comfyui")
    return folded_dtype(adapter, [one.scaling * (one.rank if by_rank else 1) for one in adapter.updates.values()])


def _bytes(form: str, adapter: AdapterFile, modules: Mapping[str, BaseModule] | None) -> int | None:
    if form == "merged":
        return None
    width = _dtype(form, adapter).itemsize
    sizes = [one.A.shape[1] + len(one.B) for one in adapter.updates.values()]
    if form == "mlx":
        return width * max(adapter.ranks.values()) * sum(sizes)
    if form == "uniform":
        filled = [module.d_in + module.d_out for module in absent_modules(adapter, modules)[0].values()]
        return width * rank_for(adapter) * (sum(sizes) + sum(filled))
    return width * adapter.numbers


def _always(adapter: AdapterFile) -> str | None:
    return None


def _plain(adapter: AdapterFile) -> str | None:
    found = adapter.beside_lora
    return f"it does not read {' and '.join(found)}" if found else None


def _plain_or_classifier(adapter: AdapterFile) -> str | None:
    config = adapter.config
    only_head = config.modules_to_save and set(config.modules_to_save) <= {"classifier", "score"}
    return None if only_head and len(adapter.beside_lora) == 1 else _plain(adapter)


def _own_rank(adapter: AdapterFile) -> str | None:
    """alpha of the configuration, divided by the rank of each tensor itself."""
    alpha, ranks = adapter.config.lora_alpha, adapter.ranks
    return _factor(adapter, lambda name: alpha / ranks[name], "alpha / each tensor's own rank")


def _one_factor(adapter: AdapterFile) -> str | None:
    """One alpha / r for all modules; the patterns are ignored."""
    config = adapter.config
    one = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return _rank_limit(adapter) or _factor(adapter, lambda _: one, "one alpha / r for all modules")


def _factor(adapter: AdapterFile, taken: Callable[[str], float], rule: str) -> str | None:
    ratios = [taken(name) / one.scaling for name, one in adapter.updates.items() if one.scaling]
    if all(abs(ratio - 1) < 1e-6 for ratio in ratios):
        return None
    low, high = min(ratios), max(ratios)
    times = f"{low:.3g}" if high - low < 1e-6 * high else f"{low:.3g} to {high:.3g}"
    return f"wrong without a message: it takes {rule}, which is {times} times the right factor"


def _rank_limit(adapter: AdapterFile) -> str | None:
    largest = max(adapter.ranks.values())
    served = SERVED_RANKS[-1]
    return f"a module has rank {largest}, and it serves at most {served}" if largest > served else None


def _one_rank(adapter: AdapterFile) -> str | None:
    ranks = set(adapter.ranks.values())
    if len(ranks) > 1:
        return f"it wants one rank for all modules, and the adapter has {min(ranks)} to {max(ranks)}"
    if adapter.config.use_rslora:
        return "it does not know rsLoRA"
    return _one_factor(adapter) or _absent(adapter)


def _absent(adapter: AdapterFile) -> str | None:
    missing = list(absent_modules(adapter, None)[0])
    return f"{missing[0]} has no LoRA, and it expects the same projections in each layer" if missing else None


def _converts(adapter: AdapterFile) -> str | None:
    problem = _own_rank(adapter)
    return "it reads GGUF" + ("" if problem is None else f", and its own conversion of this folder would be {problem}")


PROGRAMS = (
    Program("PEFT", ("peft",), lambda _: None, kind="any", too_much=lambda _: None),
    Program("vLLM, new", ("tight", "uniform", "merged"), _rank_limit, too_much=_plain_or_classifier),
    Program("vLLM, old", ("uniform", "merged"), _one_factor),
    Program("SGLang", ("uniform", "merged"), _one_rank),
    Program("TGI", ("uniform", "merged"), _one_rank),
    Program("LoRAX", ("uniform", "merged"), _one_rank),
    Program("llama.cpp", ("gguf", "merged"), _converts),
    Program("Ollama", ("gguf", "merged"), _converts),
    Program("TensorRT-LLM", ("tight", "merged"), _own_rank),
    Program("MLX-LM", ("mlx", "merged"), lambda _: "it has a format of its own"),
    Program("ONNX Runtime GenAI", ("merged",), lambda _: None),
    Program("diffusers", ("diffusers",), lambda _: "it has keys of its own", kind="image"),
    Program("ComfyUI", ("comfyui",), lambda _: "it has keys of its own", kind="image"),
)
"""The programs of the table."""
