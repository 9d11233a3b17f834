"""The per-head forward of a layer: gates per sample, plain LoRA in every file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lorank.lora import HeadGroups, find_layers, merge_heads_, plan_for_heads, resize_, save_adapter
from lorank.lora.variants.per_head import head_ranks_of
from lorank.scoring import ablation_scores
from tests.lora.forms import in_heads
from tests.models import tiny_bert, tiny_gpt2, tiny_llama, token_batch


def test_a_gate_per_sample_takes_effect() -> None:
    """Scoring evaluates several variants of a model in one forward."""
    model, layers, _ = in_heads()
    gates = {name: torch.rand(2, layer.rank) for name, layer in layers.items()}
    batch = {key: value[:1] for key, value in token_batch().items() if key != "labels"}
    single = []
    with torch.no_grad():
        for sample in range(2):
            for name, layer in layers.items():
                layer.gate = gates[name][sample]
            single.append(model.eval()(**batch).logits)
        for name, layer in layers.items():
            layer.gate = gates[name]
        both = model(**{key: value.repeat(2, 1) for key, value in batch.items()}).logits
    torch.testing.assert_close(both, torch.cat(single), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (tiny_llama, {}),
        (tiny_bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (tiny_llama, {"use_rslora": True}),
    ],
    ids=["llama", "bert", "gpt2_fused_qkv", "rslora"],
)
def test_the_saved_adapter_is_one_plain_lora(make: Callable[[], Any], lora: dict[str, Any], tmp_path: Path) -> None:
    model, layers, _ = in_heads(make(), **lora)
    resize_(layers, {n: plan_for_heads(x.head_ranks, [2, 0, *x.head_ranks[2:]]) for n, x in layers.items() if x.groups})
    layers.learn_gates(torch.linspace(0.5, 1.5, layers.total_rank))
    batch = token_batch(padded=True)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        save_adapter(layers, tmp_path / "adapter")
        assert layers[next(iter(layers))].groups is not None  # the live model goes on
        reloaded = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    for name, layer in find_layers(reloaded).items():
        assert layer.rank == layers[name].rank
        assert (layer.A.shape[1], layer.B.shape[0]) == (layers[name].d_in, layers[name].d_out)


def test_scores_in_per_head_form_equal_those_of_the_equivalent_plain_lora() -> None:
    model, layers, _ = in_heads()
    batch = token_batch(padded=True)
    found = ablation_scores(model, layers, batch, engine="exact")
    assert found.engine == "exact", found.notice
    merge_heads_(layers)
    plain = ablation_scores(model, layers, batch, engine="reference")
    for name, scores in plain.scores.items():
        torch.testing.assert_close(found.scores[name], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("ranks", [(2, 0, 1), (0, 3, 0), (1, 1, 1)])
def test_the_ranks_of_heads_are_read_from_the_zeros_of_a_plain_lora(kind: Any, ranks: tuple[int, ...]) -> None:
    groups = HeadGroups(kind, 3, 2)
    A, B = plain_lora(groups, ranks)
    assert head_ranks_of(A, B, groups, ()) == ranks


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_ranks_that_are_zero_belong_to_the_head_before_them_or_to_the_preferred_head(kind: Any) -> None:
    groups = HeadGroups(kind, 3, 2)
    A, B = plain_lora(groups, (1, 2, 0))
    owned = B.T if kind == "rows" else A
    owned[1] = 0  # the first rank of head 1
    assert head_ranks_of(A, B, groups, ()) == (2, 1, 0)
    assert head_ranks_of(A, B, groups, (1, 2, 0)) == (1, 2, 0)
    assert head_ranks_of(A, B, groups, (0, 3, 0)) == (2, 1, 0)  # rank 0 is not zero outside head 1


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_lora_that_is_not_per_head_has_no_ranks_of_heads(kind: Any) -> None:
    groups = HeadGroups(kind, 3, 2)
    A, B = plain_lora(groups, (1, 1, 1))
    backwards = [2, 1, 0]
    assert head_ranks_of(A[backwards], B[:, backwards], groups, ()) is None
    owned = B.T if kind == "rows" else A
    owned[0] = 1.0  # a rank in all heads
    assert head_ranks_of(A, B, groups, (1, 1, 1)) is None


def plain_lora(groups: HeadGroups, ranks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A (R, d_in) and B (d_out, R) with zeros outside the blocks of the heads; the other side has 5 entries."""
    rows = groups.kind == "rows"
    heads = [head for head, rank in enumerate(ranks) for _ in range(rank)]
    owned = torch.zeros(len(heads), groups.count * groups.size)
    for rank, head in enumerate(heads):
        owned[rank, head * groups.size : (head + 1) * groups.size] = 1 + rank
    full = torch.ones(len(heads), 5)
    return (full, owned.T.clone()) if rows else (owned, full.T.clone())
