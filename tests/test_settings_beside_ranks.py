"""What a user sets in a LoraConfig beside r stays as set when ranks move, and a file in plain PEFT computes the same.

Ranks and alphas by patterns, embeddings and output layers, tied or not, modules and tokens that are trained as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorank
from lorank.lora import find_layers, save_adapter
from lorank.testing import plain_peft
from tests.methods import METHODS, STEPS
from tests.models import tiny_gpt2, tiny_llama, token_batch
from tests.test_saved_equals_live import EmptyAndMove, gap, logits, run

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's advice on tied weights

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def llama(**changes: Any) -> nn.Module:
    return tiny_llama(1, **changes)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def two_blocks() -> nn.Module:
    return tiny_llama(2)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lm_head": (llama, {"target_modules": [*TARGETS, "lm_head"]}),
    "both embeddings": (llama, {"target_modules": [*TARGETS, "lm_head", "embed_tokens"]}),
    "embedding of a tied pair": (tied, {"target_modules": [*TARGETS, "embed_tokens"]}),
    "lm_head of a tied pair": (tied, {"target_modules": [*TARGETS, "lm_head"]}),
    "both of a tied pair": (tied, {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]}),
    "tied, GPT-2": (tiny_gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "lm_head saved": (llama, {"modules_to_save": ["lm_head"]}),
    "a tied pair saved": (tied, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms saved": (llama, {"modules_to_save": ["norm"]}),
    "tokens of a tied pair": (tied, {"trainable_token_indices": [3, 4]}),
    "tokens of both": (llama, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}),
    "patterns": (
        two_blocks,
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6, "down_proj": 3},
            "alpha_pattern": {"q_proj": 16, r"layers\.1\..*up_proj": 1},
        },
    ),
    "full names, rsLoRA": (
        two_blocks,
        {
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3},
            "use_rslora": True,
        },
    ),
    "patterns, DoRA": (two_blocks, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_dora": True}),
    "patterns, some blocks": (two_blocks, {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}}),
    "patterns, a regular expression": (
        two_blocks,
        {"target_modules": r".*layers\.1.*_proj", "exclude_modules": ["gate_proj"], "rank_pattern": {"k_proj": 1}},
    ),
    "patterns, an embedding": (
        llama,
        {
            "target_modules": [*TARGETS, "embed_tokens"],
            "rank_pattern": {"embed_tokens": 7},
            "alpha_pattern": {"embed_tokens": 3},
            "lora_dropout": 0.1,
        },
    ),
}


def make(case: str) -> PeftModel:
    base, lora = CASES[case]
    return get_peft_model(base(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **lora}))


@pytest.mark.parametrize("case", CASES)
def test_ranks_move_and_all_else_stays(case: str, tmp_path: Path) -> None:
    model = make(case)
    before = {name: layer.scaling for name, layer in find_layers(model).items()}
    made = find_layers(model).ranks
    ranks = run(model, EmptyAndMove(), 6)
    assert ranks != made
    for name, layer in find_layers(model).items():
        if layer.rank:
            assert layer.scaling == pytest.approx(before[name]), name
    model.save_pretrained(tmp_path / "pefts")
    save_adapter(find_layers(model), tmp_path / "ours")
    for folder in ("pefts", "ours"):
        loaded = PeftModel.from_pretrained(CASES[case][0](), tmp_path / folder)
        assert gap(loaded, logits(model)) <= 1e-6, folder
        for name, layer in find_layers(loaded).items():
            assert layer.scaling == pytest.approx(before[name]), name


@pytest.mark.parametrize("method", ["alora-first-order", "adalora", "ard", "balanced"])
def test_budgets_count_the_ranks_that_patterns_give(method: str, tmp_path: Path) -> None:
    """In a process of its own, without lorank, the file computes what is live."""
    model = make("patterns")
    made = find_layers(model)
    size, ranks = made.parameters, made.ranks
    assert {ranks[f"model.layers.{block}.self_attn.v_proj"] for block in (0, 1)} == {4, 6}
    assert lorank.Budget.parse("50% of adapter").resolve(made).constraints[0].limit == size // 2
    found = run(model, METHODS[method].make("50% of adapter"), STEPS)
    layers = find_layers(model)
    assert layers.parameters <= size // 2
    assert len(set(found.values())) > 1
    two_blocks().save_pretrained(tmp_path / "base")
    save_adapter(layers, tmp_path / "adapter")
    expected = logits(model)
    there = plain_peft().logits(
        tmp_path / "base", tmp_path / "adapter", {"input_ids": token_batch(seed=5)["input_ids"]}
    )
    assert float((there["logits"] - expected).abs().max()) <= 1e-5
    assert torch.allclose(there["merged"], expected, rtol=1e-4, atol=1e-4)
