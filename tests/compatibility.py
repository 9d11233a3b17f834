"""Which method works with what, and the test that shows it:  python -m tests.compatibility

Prints two tables of docs/compatibility.md; ``tests/test_compatibility.py`` checks that the page has them, and that all
tests named here are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


_FEATURES, _TOGETHER_TESTS = f"{TRAINING}/test_loop_features.py", f"{TRAINING}/test_adapters_together.py"
_TRAINER, _OPTIMIZERS = f"{TRAINING}/test_trainer_callback.py", f"{TRAINING}/test_optimizers.py"
_ALIKE = f"{TRAINING}/test_trl_preferences.py::test_ranks_move_and_scores_are_of_the_trainers_loss"
_RESUMED = f"{_OPTIMIZERS}::test_a_run_through_rank_0_goes_on_exactly_from_its_checkpoint"
_SAVERS = f"{TRAINING}/test_memory_savers.py"

LOOPS: dict[str, Cell] = {
    "a loop of one's own": Cell("yes", f"{TRAINING}/test_attach.py::test_a_five_line_loop_allocates"),
    "accelerate": Cell("yes", f"{TRAINING}/test_attach.py::test_accelerates_wrapped_optimiser_allocates"),
    "Lightning": Cell(
        "yes, bit for bit a plain loop",
        f"{TRAINING}/test_lightning.py::test_lightning_gives_what_a_plain_loop_gives[balanced-2]",
    ),
    "Lightning, resumed": Cell(
        "yes, attached before `fit`",
        f"{TRAINING}/test_lightning.py::test_a_run_goes_on_exactly_from_lightnings_checkpoint",
    ),
    "transformers' Trainer": Cell(
        "yes", f"{_TRAINER}::test_the_trainer_allocates_and_every_checkpoint_is_a_plain_adapter"
    ),
    "TRL, SFT": Cell("yes", f"{_TRAINER}::test_trls_sft_trainer_allocates"),
    "TRL, SFT with packed rows": Cell(
        "yes", f"{TRAINING}/test_trl_packing.py::test_packed_rows_train_and_are_scored_exactly[bfd]"
    ),
    "TRL, DPO": Cell("yes, with the trainer's loss", f"{_ALIKE}[dpo-alora]"),
    "TRL, DPO of a trained adapter": Cell(
        "yes, its copy is the reference and keeps its ranks", f"{_ALIKE}[dpo, trained adapter-alora]"
    ),
    "TRL, KTO": Cell("yes, with the trainer's loss", f"{_ALIKE}[kto-ard]"),
    "TRL, reward": Cell("yes, with the trainer's loss", f"{_ALIKE}[reward-balanced]"),
    "TRL, GRPO": Cell(
        "methods without a batch",
        f"{TRAINING}/test_trl_generating.py::test_balanced_lora_without_a_gradient_start_allocates_in_grpo",
    ),
    "`optimizer.step(closure)`": Cell(
        "yes", f"{TRAINING}/test_step_hooks.py::test_a_closure_changes_nothing[balanced-positional]"
    ),
    "gradient checkpointing, accumulation, offloaded activations": Cell("yes", f"{_SAVERS}::test_memory_savers[alora]"),
    "NEFTune": Cell("yes", f"{_SAVERS}::test_with_neftune[alora]"),
    "`torch_compile` of the Trainer": Cell(
        "yes", f"{_FEATURES}::test_a_trainer_that_compiles_gives_the_same_losses_and_ranks"
    ),
    "`IterableDataset`": Cell(
        "yes, with batches of yours", f"{_FEATURES}::test_a_stream_with_batches_of_the_user[alora-first-order]"
    ),
    "`auto_find_batch_size`": Cell(
        "yes",
        f"{TRAINING}/test_attached_runs.py::test_a_retry_with_a_smaller_batch_has_the_budget_of_the_first_attempt"
        "[adalora-7]",
    ),
    "liger kernels": Cell(
        "a loss without logits is scored; the kernels need a GPU and were not run",
        f"{_FEATURES}::test_a_model_that_gives_no_logits_with_labels[alora]",
    ),
    "LoRA+ groups": Cell("yes", f"{_FEATURES}::test_lora_plus_groups_keep_their_rates[balanced]"),
    "Muon": Cell("yes", f"{_RESUMED}[Muon]"),
    "schedule-free": Cell("yes, without gates", f"{_RESUMED}[optim=schedule_free_adamw]"),
    "Lion, 8-bit": Cell("yes", f"{_RESUMED}[optim=lion_8bit]"),
    "AdamW, paged and 8-bit": Cell("yes; pages need a GPU", f"{_RESUMED}[optim=paged_adamw_8bit]"),
    "SAM": Cell("attached to its inner optimiser", f"{_OPTIMIZERS}::test_the_remedy_for_sam_works"),
    "averages of weights (EMA)": Cell(
        "begun after the last move",
        f"{_FEATURES}::test_an_average_that_begins_after_the_last_move_is_that_of_the_weights",
    ),
    "averages begun earlier": Cell(
        "PyTorch's error about shapes", f"{_FEATURES}::test_an_average_of_other_ranks_stops_with_an_error"
    ),
    "two adapters in a model, a run each": Cell(
        "yes", f"{TRAINING}/test_attached_runs.py::test_two_adapters_of_a_model_have_a_run_each"
    ),
    "`disable_adapter` within a run": Cell(
        "yes",
        f"{_TOGETHER_TESTS}::test_the_adapter_switched_off_within_a_run_is_the_base_model_and_changes_nothing[balanced]",
    ),
    "`add_weighted_adapter`, cat and svd": Cell(
        "yes", f"{_TOGETHER_TESTS}::test_a_weighted_sum_is_that_of_the_updates[cat]"
    ),
    "`load_adapter` in the place of another": Cell(
        "yes", f"{_TOGETHER_TESTS}::test_another_adapter_takes_the_place_of_one_with_other_ranks"
    ),
    "`hotswap_adapter` with other ranks": Cell(
        "PEFT refuses another alpha_pattern; its swap is exact",
        f"{_TOGETHER_TESTS}::test_a_hot_swap_with_other_ranks[padded for a compiled model]",
    ),
}
"""Loops and what they bring along."""


def cells() -> dict[tuple[str, str], Cell]:
    """All of them, by method and column."""
    return {(method, column): cell(method) for method in ROWS for column, cell in COLUMNS.items()}


def table() -> str:
    """As Markdown."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method, title in ROWS.items():
        lines.append(f"| {title} | {' | '.join(cell(method).says for cell in COLUMNS.values())} |")
    return "\n".join(lines)


def table_of_loops() -> str:
    """As Markdown, with the name of each test."""
    lines = ["| loop | | shown by |", "|---|---|---|"]
    for loop, cell in LOOPS.items():
        file, _, name = cell.test.partition("::")
        lines.append(f"| {loop} | {cell.says} | `{Path(file).stem}`, `{name.partition('[')[0]}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), table_of_loops(), sep="\n\n")
