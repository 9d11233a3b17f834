"""Which method works with what, and the test that shows it:  python -m tests.compatibility

Prints the table of docs/compatibility.md; ``tests/test_compatibility.py`` checks that the page has it, and that every
test named here is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ROWS = {
    "static": "LoRA, rsLoRA",
    "dora": "DoRA, with ALoRA",
    "balanced": "BalancedLoRA",
    "alora-first-order": "ALoRA",
    "alora": "ALoRA, exact scores",
    "alora-sensi": "ALoRA-Sensi",
    "alora-dnas": "ALoRA-DNAS",
    "adalora": "AdaLoRA",
    "sora": "SoRA",
    "ard": "ARD-LoRA, a rank per module",
    "ard-heads": "ARD-LoRA, a rank per head",
}
"""By the names of tests/methods.py."""


@dataclass(frozen=True)
class Cell:
    """One method with one thing.

    Args:
        says: ``yes``; ``refused``: with an error that says why and what to do; or why it is not known.
        test: the test that shows it, FILE::NAME[CASE], or a row that FILE holds.
    """

    says: str
    test: str


TRAINING = "tests/training"


def _linear(method: str) -> Cell:
    name = "test_with_dora[alora]"
    if method != "dora":
        name = f"test_a_resumed_run_equals_the_uninterrupted_run[causal-{method}]"
    return Cell("yes", f"tests/test_conformance.py::TestMethods::{name}")


def _kind(kind: str) -> Callable[[str], Cell]:
    def cell(method: str) -> Cell:
        case = f"alora-dora-{kind}" if method == "dora" else f"{method}-lora-{kind}"
        says = "a rank per module" if (method, kind) == ("ard-heads", "Conv") else "yes"
        return Cell(says, f"{TRAINING}/test_layer_kinds.py::test_ranks_move_and_what_is_saved_is_plain_peft[{case}]")

    return cell


def _quantised(base: str) -> Callable[[str], Cell]:
    def cell(method: str) -> Cell:
        says = "yes"
        if method == "dora":
            says = {"bnb8": "refused on a CPU", "torchao8": "yes; merging is refused"}.get(base, says)
        name = "test_a_method_trains_and_what_it_saves_and_merges_is_what_it_trained"
        return Cell(says, f"{TRAINING}/integrations/test_quantised_base.py::{name}[{method}-{base}]")

    return cell


_TOGETHER = "test_two_processes_have_the_same_and_what_one_would_have"
_FILES = {"ddp": f"{TRAINING}/parallel/test_ddp.py", "fsdp2": f"{TRAINING}/parallel/test_fsdp.py"}
_IN_TESTS = {
    "ddp": {"alora", "alora-first-order", "alora-dnas", "adalora", "sora", "ard", "balanced"},
    "fsdp2": {"alora", "alora-first-order", "adalora", "balanced"},
}
_OTHER_NAMES = {"ard-heads": "ard per head", "dora": "DoRA"}


def _processes(wrap: str) -> Callable[[str], Cell]:
    def cell(method: str) -> Cell:
        if method in _IN_TESTS[wrap] or method in _OTHER_NAMES:
            name = _OTHER_NAMES.get(method, method) + (", FSDP2" if wrap == "fsdp2" else "")
            return Cell("yes", f"{_FILES[wrap]}::{_TOGETHER}[{name}]")
        return Cell("yes", f"docs/distributed.md: | {wrap} | 2 | {method} |")

    return cell


def _zero3(method: str) -> Cell:
    if method == "dora":
        return Cell("refused", "tests/lora/test_reserve.py::test_layers_that_cannot_reserve_ranks_are_refused")
    refused = {
        "ard-heads": "ranks per head",
        "alora-dnas": "backward passes under ZeRO-3",
        "alora-first-order": "estimates under ZeRO-3",
    }
    file = f"{TRAINING}/parallel/test_deepspeed.py"
    if method in refused:
        return Cell("refused", f"{file}::test_unsupported_runs_are_refused[{refused[method]}]")
    if method in ("alora", "sora", "balanced"):
        says = 'with init="default"' if method == "balanced" else "yes"
        return Cell(says, f"{file}::test_ranks_and_losses_are_those_of_one_process[ZeRO-3, {method}]")
    return Cell("yes", f"docs/distributed.md: | zero3 | 2 | {method} |")


def _compiled(method: str) -> Cell:
    file = f"{TRAINING}/integrations/test_torch_compile.py"
    if method == "ard-heads":
        return Cell("refused", f"{file}::test_ranks_per_head_are_refused_before_anything_changes")
    if method == "alora":
        name = "test_every_change_of_ranks_compiles_once_however_many_there_are[wrapped]"
        return Cell("yes", f"{file}::{name}")
    if method == "balanced":
        return Cell(
            "scored on a validation batch", "tests/allocators/test_balanced.py::TestCompiled::test_it_measures_there"
        )
    if method == "alora-sensi":
        return Cell("as ALoRA", f"{file}::test_methods_compile[alora-first-order]")
    return Cell("yes", f"{file}::test_methods_compile[{method}]")


COLUMNS: dict[str, Callable[[str], Cell]] = {
    "Linear": _linear,
    "Conv1D": _kind("Conv1D"),
    "Embedding": _kind("Embedding"),
    "Conv1d, 2d, 3d": _kind("Conv"),
    "bitsandbytes 4-bit": _quantised("bnb4"),
    "bitsandbytes 8-bit": _quantised("bnb8"),
    "torchao int8": _quantised("torchao8"),
    "HQQ": _quantised("hqq"),
    "DDP": _processes("ddp"),
    "FSDP2": _processes("fsdp2"),
    "ZeRO-3": _zero3,
    "torch.compile": _compiled,
    "checkpointing": lambda method: Cell("yes", f"{TRAINING}/test_memory_savers.py::test_memory_savers[{method}]"),
    "bf16": lambda method: Cell(
        "yes", f"{TRAINING}/integrations/test_grad_scaling.py::test_under_autocast[bf16-{method}]"
    ),
}


def cells() -> dict[tuple[str, str], Cell]:
    """All of them, by method and column."""
    return {(method, column): cell(method) for method in ROWS for column, cell in COLUMNS.items()}


def table() -> str:
    """As Markdown."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method, title in ROWS.items():
        lines.append(f"| {title} | {' | '.join(cell(method).says for cell in COLUMNS.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
