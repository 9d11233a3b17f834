"""The cases that run only with ``pytest --all``: further cases of a kind of which another one always runs.

``make test`` stays short, and ``make test-all`` leaves nothing out.
"""

from __future__ import annotations

import re

DDP = ("alora-dnas", "alora-options", "alora-first-order", "adalora", "sora", "DoRA")
FSDP = ("adalora, FSDP2", "alora-first-order, FSDP2", "DoRA, FSDP2", "ard per head, FSDP2")
DEEPSPEED = (
    *("ZeRO-2, alora", "ZeRO-2, adalora", "ZeRO-3, sora", "ZeRO-2, balanced", "ZeRO-1, ard"),
    *("backward passes under ZeRO-3", "estimates under ZeRO-3", "a gradient start under ZeRO-3"),
)
"""Cases of the fixtures with real processes, which leave them out too (``python -m
tests.training.parallel.processes_table`` runs every method in every form)."""

FAMILIES = (
    *("Gemma 3", "Phi-3", "GPT-NeoX", "BLOOM", "Falcon", "OPT", "MPT", "Jamba", "BART", "BERT, tokens", "BERT, spans"),
    *("BERT, several labels", "BERT, choices", "DeBERTa-v2", "DistilBERT", "Swin", "Qwen2-VL"),
)
"""``python -m tests.families`` runs these too, with every method, and writes the table of docs/compatibility.md."""


def _names(names: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, names))


_CONFORMANCE = r"tests/test_conformance\.py::TestMethods::"
ONE_MORE = (
    # every unit of a budget with one method, one unit with all methods
    _CONFORMANCE + r"test_the_run_ends_at_or_under_its_budget\[(encoder|vision)-.+\]",
    _CONFORMANCE + r"test_the_run_ends_at_or_under_its_budget\[causal-(?!parameters-).+-(?!alora\]).+\]",
    # every method on one model, one method on the others
    _CONFORMANCE + r"test_a_resumed_run_equals_the_uninterrupted_run\[(encoder|vision)-(?!alora\]).+\]",
    _CONFORMANCE + r"test_an_adapter_saved_at_any_step_loads_in_plain_peft\[(encoder|vision)-(?!alora\]).+\]",
    # a Trainer takes seconds: three methods
    _CONFORMANCE + r"test_the_trainer_trains_saves_and_resumes_exactly\[causal-(?!alora\]|ard-heads\]|balanced\]).+\]",
    r"tests/test_conformance\.py::test_the_trainer_with_other_models\[ard-heads-.+\]",
    r"tests/training/test_larger_models\.py::test_a_trainers_run_of_a_larger_model_.+\[(?!alora\]).+\]",
    r"tests/training/test_attached_runs\.py::test_an_interrupted_trainer_resumes_.+\[(?!alora-|ard-heads-).+\]",
    r"tests/training/integrations/test_torch_compile\.py::test_methods_compile\[(?!alora\]|ard\]).+\]",
    r"tests/training/integrations/test_torch_compile\.py::test_every_change_of_ranks_.+\[wrapped\]",
    r"tests/allocators/test_registry\.py::test_a_recipe_names_a_package_s_method_.+",
    rf"tests/training/parallel/test_ddp\.py::test_two_processes_.+\[({_names(DDP)})\]",
    r"tests/training/parallel/test_ddp\.py::test_so_do_four_processes",
    rf"tests/training/parallel/test_fsdp\.py::test_two_processes_.+\[({_names(FSDP)})\]",
    rf"tests/training/parallel/test_deepspeed\.py::.+\[({_names(DEEPSPEED)})\]",
    r"tests/training/test_memory_savers\.py::test_memory_savers\[(?!alora\]|dora\]|ard-heads\]).+\]",
    r"tests/allocators/ard/test_allocator\.py::test_alpha_is_that_of_a_twin_.+\[(none|tv|l1)\]",
    r"tests/allocators/test_initial_ranks\.py::TestEva::test_ranks_and_directions_.+\[4\]",
    rf"tests/families/test_families\.py::test_a_family_trains_.+\[({_names(FAMILIES)})\]",
    # tests/test_kills.py kills a run of lorank train three times
    r"tests/training/test_trainer_callback\.py::test_a_run_killed_between_two_allocations_.+",
    r"tests/experiments/study/test_trials\.py::test_a_study_survives_a_kill\[1\]",
    # variants of ALoRA, which have test files of their own
    r"tests/.+\[(.+-)?alora-(retry|first-order|sensi|dnas)(-.+)?\]",
    r"tests/training/integrations/test_grad_scaling\.py::test_under_autocast\[bf16-(?!alora\]|ard-heads\]).+\]",
    r"tests/scoring/test_successive_screening\.py::test_the_same_ranks_go_.+\[curved-.+-reference\]",
    r"tests/experiments/sweep/test_workers\.py::test_two_workers_share_a_study_.+\[postgresql\]",
    _CONFORMANCE + r"test_with_rank_stabilised_scaling\[(?!alora\]|ard-heads\]|balanced\]).+\]",
    # DoRA of every kind of layer with three methods, LoRA with all; every method with each kind of bias but one
    r"tests/training/test_layer_kinds\.py::test_ranks_move_and_what_.+\[(?!alora-|ard-heads-|balanced-).+-dora-.+\]",
    r"tests/test_saved_equals_live\.py::test_no_method_takes_the_last_.+\[\{'bias': 'lora_only'\}-(?!alora\]).+\]",
    # every method where whole modules have ranks, three where heads have them
    r"tests/experiments/test_planted\.py::test_every_method_ends_.+\[(?!alora-heads|ard-|uniform-).+-heads\]",
    r"tests/test_examples\.py::test_notebook\[which_rank\]",
    r"tests/test_examples\.py::test_torchrun_in_two_processes",
    r"tests/test_examples\.py::test_the_trainer_on_a_base_model_that_transformers_sharded",
    r"tests/test_benchmarks\.py::test_(run|growth|truncation|scores|step_on_a_4_bit_base)",
    r"tests/experiments/test_posthoc\.py::test_half_of_an_adapter\[ablation\]",
    r"tests/experiments/compare/test_comparison\.py::test_(planted_ranks_are_a_comparison_too|jobs_give_the_same_results)",
    r"tests/training/test_attached_runs\.py::test_a_retry_with_a_smaller_batch_.+\[(?!alora-|ard-heads-).+\]",
)


def is_one_more(nodeid: str) -> bool:
    """Whether a test, by its full name, is left out without ``--all``."""
    return any(re.fullmatch(pattern, nodeid) for pattern in ONE_MORE)


def stale(nodeids: list[str]) -> list[str]:
    """The patterns that no test has."""
    return [pattern for pattern in ONE_MORE if not any(re.fullmatch(pattern, nodeid) for nodeid in nodeids)]
