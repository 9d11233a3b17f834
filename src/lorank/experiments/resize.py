"""Resizing the file of an adapter, without data and without its base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorank.allocators import Budget, resize_layers_
from lorank.errors import BudgetError
from lorank.experiments.adapter_folder import adapter_of_run, budget_of_adapter, check_pruned_folder
from lorank.lora import AdapterLayer, AdapterLayers, check_save_directory, open_standalone, save_standalone


@dataclass(frozen=True)
class Resized:
    """A resized adapter. All figures are of its files, read again.

    Args:
        folder: its folder.
        ranks: per module, (before, after).
        parameters: numbers in A and B, (before, after).
        energy: the share of Σ ‖s B A‖² over all modules that it holds; 1: all, or there was none.
        change: the largest ‖s B A − s' B' A'‖ / ‖s B A‖ of any module; 0: no update has changed.
    """

    folder: Path
    ranks: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    energy: float
    change: float


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    budget: str | None = None,
    max_lora_rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Resized:
    """Writes a copy of an adapter with other ranks (:func:`lorank.resize_adapter_`).

    Args:
        adapter: the folder of a plain PEFT LoRA adapter, or of a finished `lorank train`. It is not changed.
        out: the folder for the new adapter.
        rank: the rank of every module.
        budget: the size of the adapter, as text: `50%` (of this adapter's parameters), 8, 120 ranks, 2M or 8MB.
        max_lora_rank: with a budget, or alone in its place: the highest rank of any module.
        energy: the share of ‖B A‖² that every module keeps, in (0, 1].
        overwrite: replace an adapter in `out`. The original is never replaced, and other files are never touched.
        seed: the seed of new rows of A.

    Raises:
        AdapterError: the adapter cannot be read without its base model; or see :func:`lorank.resize_adapter_`; or `out`
            is the folder of the original, or it is not empty.
        BudgetError: not exactly one size is given, it is out of its range, the adapter already fits it, or it is a part
            of the base model, whose size is not known here.
        PlanError: a module cannot hold so many ranks.
    """
    folder = adapter_of_run(Path(adapter))
    check_pruned_folder(Path(adapter), Path(out), overwrite=overwrite)
    check_save_directory(Path(out))
    wanted = size_of(budget, max_lora_rank)
    before, changed = open_standalone(folder), open_standalone(folder)
    resize_layers_(changed.layers, rank=rank, budget=wanted, energy=energy, seed=seed)
    written = open_standalone(save_standalone(changed, out))
    energies, losses = compare_updates(before.layers, written.layers)
    total = sum(energies.values())
    return Resized(
        folder=Path(out),
        ranks={name: (one.rank, written.layers.ranks.get(name, 0)) for name, one in before.layers.items()},
        parameters=(before.layers.parameters, written.layers.parameters),
        energy=1 - sum(losses.values()) / total if total else 1.0,
        change=max((losses[name] / energy) ** 0.5 if energy else 0.0 for name, energy in energies.items()),
    )


def size_of(budget: str | None, max_lora_rank: int | None) -> Budget | None:
    """The budget of `lorank resize` from its options; None: neither is given.

    Raises:
        BudgetError: it cannot be read, is not smaller than the adapter, or is a part of the base model.
    """
    if budget is None:
        return None if max_lora_rank is None else Budget(max_lora_rank=max_lora_rank)
    wanted = budget_of_adapter(budget)
    if wanted.percent is not None:
        raise BudgetError(
            f"--budget {budget!r} is a part of the base model, which lorank resize does not read: give '50%' (of this "
            "adapter), 8, 120 ranks, 2M or 8MB"
        )
    return wanted if max_lora_rank is None else replace(wanted, max_lora_rank=max_lora_rank)


def compare_updates(before: AdapterLayers, after: AdapterLayers) -> tuple[dict[str, float], dict[str, float]]:
    """Per module ‖s B A‖² before, and ‖s B A − s' B' A'‖²: from products of factors, (d, d) is never formed."""
    energies, losses = {}, {}
    for name, layer in before.items():
        left, right = _factors(layer)
        energies[name] = _square(left, right)
        if name in after:
            new_left, new_right = _factors(after[name])
            left, right = torch.cat([left, -new_left], 2), torch.cat([right, new_right], 1)
        losses[name] = _square(left, right)
    return energies, losses


def _factors(layer: AdapterLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """s B and A of every block, (blocks, d_out, r) and (blocks, r, d_in): one per expert or group, else one."""
    by_block = layer.layout.by_block
    return layer.scaling * by_block(layer.B.detach().double(), 1), by_block(layer.A.detach().double(), 0)


def _square(left: torch.Tensor, right: torch.Tensor) -> float:
    """‖left · right‖² over all blocks, by triangular factors, which lose no digits to cancellation."""
    upper = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT  # (blocks, ·, ·), of at most r rows and columns
    return float(upper.square().sum())
