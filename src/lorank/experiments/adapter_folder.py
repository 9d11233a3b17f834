"""The folders of commands for finished adapters, and their budgets. They are checked before slow imports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorank.errors import AdapterError, BudgetError
from lorank.experiments.errors import SettingsError
from lorank.experiments.folder_check import CONFIG

if TYPE_CHECKING:
    from lorank.allocators import Budget

ADAPTER = "adapter"
"""The adapter's folder inside the folder of a run."""

_ADAPTER_CONFIG = "adapter_config.json"
_PER_CENT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*")


def adapter_of_run(path: Path) -> Path:
    """The adapter's folder inside the folder of a finished run; any other folder as it is."""
    return path / ADAPTER if (path / CONFIG).is_file() and (path / ADAPTER).is_dir() else path


def check_adapter(path: Path) -> None:
    """Checks that a folder holds an adapter, or a run with an adapter.

    Raises:
        AdapterError: there is no such folder, or it has no adapter_config.json.
    """
    folder = adapter_of_run(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder. Give the folder of an adapter or of a finished run")
    if not (folder / _ADAPTER_CONFIG).is_file():
        merged = " It holds a whole model, in which no ranks are left." if (folder / "config.json").is_file() else ""
        raise AdapterError(
            f"{folder} has no {_ADAPTER_CONFIG}.{merged} Give the folder that save_pretrained of the PEFT model wrote"
        )


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises SettingsError if the value of an option is not one of the choices."""
    if value not in choices:
        raise SettingsError(f"{option} {value!r}: expected one of {', '.join(choices)}")


def check_pruned_folder(adapter: Path, out: Path, *, overwrite: bool) -> None:
    """Checks that a pruned adapter may be written to `out`.

    Raises:
        AdapterError: `out` is the folder of the original, or it exists, is not empty and `overwrite` is False.
    """
    if out.resolve() in (adapter.resolve(), adapter_of_run(adapter).resolve()):
        raise AdapterError(f"--out {out} is the adapter itself, which is never changed: name another folder")
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"--out {out} already exists: name a new folder, or replace the adapter in it (--overwrite)")


def check_budget_given(budget: str | None, max_lora_rank: int | None) -> None:
    """Raises BudgetError if no budget was given."""
    if budget is None and max_lora_rank is None:
        raise BudgetError("give a budget: --budget '50% of adapter', '0.32% of base', 8, 120 ranks, 2M or 8MB")


def budget_of_adapter(spec: str) -> Budget:
    """A budget from text, in which `50%` means 50 % of the adapter's parameters.

    Raises:
        BudgetError: it cannot be read, or is not less than the adapter.
    """
    from lorank.allocators import Budget

    share = _PER_CENT.fullmatch(spec)
    budget = Budget.parse(f"{share[1]}% of adapter" if share else spec)
    if budget.percent_of_adapter is not None and budget.percent_of_adapter >= 100:
        raise BudgetError(f"--budget {spec!r}: expected less than 100 per cent of the adapter")
    return budget


def check_one_size(rank: int | None, budget: str | None, max_lora_rank: int | None, energy: float | None) -> None:
    """Raises BudgetError unless exactly one size for `lorank resize` is given, and in its range."""
    sizes = {"--rank": rank, "--budget": budget if budget is not None else max_lora_rank, "--energy": energy}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) != 1:
        raise BudgetError(
            f"give one size: --rank 8 (every module), --budget 50% (the adapter) or --energy 0.95 (the share of every "
            f"update that stays); given: {' and '.join(given) or 'none'}"
        )
    if energy is not None and not 0 < energy <= 1:
        raise BudgetError(f"--energy {energy:g}: expected a share above 0 and at most 1, such as 0.95")


def check_weights(adapters: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """The weight of each adapter.

    Raises:
        SettingsError: there are fewer than two adapters, or another number of weights, or a weight is 0.
    """
    if len(adapters) < 2:
        raise SettingsError(f"one adapter ({', '.join(map(str, adapters))}) cannot be merged: give two or more")
    chosen = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(chosen) != len(adapters):
        raise SettingsError(
            f"--weights has {len(chosen)} numbers for {len(adapters)} adapters: give one for each, in their order"
        )
    if not all(abs(weight) > 0 and abs(weight) < float("inf") for weight in chosen):
        raise SettingsError(f"--weights {chosen}: expected numbers other than 0; leave an adapter out instead")
    return chosen
