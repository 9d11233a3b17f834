"""A LoRA per head on stock PEFT layers: fresh layers take the form, train and resize in it, and leave it plain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorank.errors import AdapterError
from lorank.lora import (
    HeadGroups,
    find_layers,
    fold_gates_,
    head_groups,
    merge_heads_,
    plan_for_heads,
    resize_,
    restore_layout_,
    split_into_heads_,
)
from tests.lora.forms import DOWN, OUT, TARGETS, Q, in_heads, logits
from tests.lora.optimizers import train_step
from tests.models import adapted, tiny_bert, tiny_llama, token_batch


def test_new_heads_keep_the_output_and_hold_only_their_blocks() -> None:
    model = adapted(tiny_llama(), random_B=False, target_modules=TARGETS)
    layers = find_layers(model)
    expected = logits(model)
    split_into_heads_(layers, head_groups(layers))
    assert torch.equal(logits(model), expected)
    q, o, down = layers[Q], layers[OUT], layers[DOWN]
    assert (q.A.shape, q.B.shape) == ((16, 32), (8, 16))  # 4 heads of width 8, r0 = 4
    assert (o.A.shape, o.B.shape) == ((16, 8), (32, 16))
    assert q.head_ranks == o.head_ranks == (4, 4, 4, 4)
    assert down.groups is None
    assert (q.d_in, q.d_out, q.rank, q.rank_parameters, q.max_rank) == (32, 32, 16, 40, 32)
    assert down.rank_parameters == down.d_in + down.d_out == 80
    assert float(o.A.detach().abs().max()) <= 8**-0.5  # as PEFT draws a LoRA of 8 inputs
    assert float(o.A.detach().abs().max()) > 32**-0.5
    assert (q.module.scaling["default"], q.module.r["default"], q.module.lora_alpha["default"]) == (2.0, 16, 32)


def test_merging_heads_keeps_the_output_and_gives_a_stock_peft_model() -> None:
    model, layers, optimizer = in_heads()
    train_step(model, optimizer, token_batch())
    layers.learn_gates(torch.linspace(0.5, 1.5, layers.total_rank))
    expected = logits(model)
    fold_gates_(layers)
    merge_heads_(layers, optimizer)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    q = layers[Q]
    assert not q.module.lora_variant
    assert (q.A.shape, q.B.shape) == ((8, 32), (32, 8))
    assert model.peft_config["default"].rank_pattern[r"^model\.layers\.0\.self_attn\.q_proj"] == 8
    train_step(model.train(), optimizer, token_batch())  # the optimiser goes on
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_heads_grow_and_shrink_with_their_moments(data: st.DataObject) -> None:
    """New ranks change nothing; kept ones keep value and moments bitwise, in head order."""
    model, layers, optimizer = in_heads()
    for _ in range(2):
        train_step(model.train(), optimizer, token_batch())
        wanted = {
            name: data.draw(st.lists(st.integers(0, 4), min_size=len(x.head_ranks), max_size=len(x.head_ranks)))
            for name, x in layers.items()
            if x.groups
        }
        shrunk = {
            name: [min(a, b) for a, b in zip(layers[name].head_ranks, w, strict=True)] for name, w in wanted.items()
        }
        before = {
            n: (x.A.data.clone(), optimizer.state[x.A]["exp_avg"].clone(), x.head_ranks) for n, x in layers.items()
        }
        resize_(layers, {n: plan_for_heads(layers[n].head_ranks, ranks) for n, ranks in shrunk.items()}, optimizer)
        expected = logits(model)
        resize_(layers, {n: plan_for_heads(layers[n].head_ranks, ranks) for n, ranks in wanted.items()}, optimizer)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
        for name, ranks in wanted.items():
            layer, (A, moments, old_ranks) = layers[name], before[name]
            assert layer.head_ranks == tuple(ranks)
            now = torch.split(layer.A.data, ranks), torch.split(optimizer.state[layer.A]["exp_avg"], ranks)
            then = torch.split(A, old_ranks), torch.split(moments, old_ranks)
            for head, rank in enumerate(shrunk[name]):
                assert torch.equal(now[0][head][:rank], then[0][head][:rank])
                assert torch.equal(now[1][head][:rank], then[1][head][:rank])
                assert not now[1][head][rank:].any()
            assert layer.module.r["default"] == layer.rank == sum(ranks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"random_B": True}, "has been trained"),
        ({"use_dora": True}, "uses DoraLinearVariant"),
    ],
)
def test_layers_without_a_per_head_form_are_refused_and_unchanged(change: dict[str, Any], said: str) -> None:
    model = adapted(tiny_llama(), **{"random_B": False, "target_modules": TARGETS, **change})
    layers = find_layers(model)
    shapes = {name: (layer.A.shape, layer.B.shape) for name, layer in layers.items()}
    with pytest.raises(AdapterError, match=said):
        split_into_heads_(layers, head_groups(layers))
    assert shapes == {name: (layer.A.shape, layer.B.shape) for name, layer in layers.items()}


def test_a_head_holds_at_most_its_width() -> None:
    layers = find_layers(adapted(tiny_llama(), random_B=False, target_modules=TARGETS, r=9))
    with pytest.raises(AdapterError, match="has width 8 and can hold at most 8 ranks, not 9"):
        split_into_heads_(layers, head_groups(layers), r0=9)
    split_into_heads_(layers, head_groups(layers))
    assert layers[Q].head_ranks == (8, 8, 8, 8)


def test_a_bias_in_lora_B_is_refused() -> None:
    layers = find_layers(adapted(tiny_bert(), random_B=False, target_modules=["query"], lora_bias=True))
    with pytest.raises(AdapterError, match="a bias in lora_B"):
        split_into_heads_(layers, head_groups(layers))


def test_splitting_twice_is_refused() -> None:
    _, layers, _ = in_heads()
    with pytest.raises(AdapterError, match="per-head form already"):
        split_into_heads_(layers, {Q: HeadGroups("rows", 4, 8)})


def test_a_saved_layout_is_restored_from_any_other() -> None:
    """A resumed run may find its layers plain and already loaded, plain and fresh, in heads, or in other heads."""
    _, layers, _ = in_heads()
    resize_(layers, {Q: plan_for_heads((2, 2, 2, 2), (1, 0, 4, 2))})  # head 2 has two ranks with B = 0
    saved = {name: (x.groups, x.head_ranks) for name, x in layers.items() if x.groups is not None}
    expected = {name: (x.A.data.clone(), x.B.data.clone()) for name, x in layers.items()}
    merge_heads_(layers)
    restore_layout_(layers, saved)
    for name, (A, B) in expected.items():
        assert torch.equal(layers[name].A, A)
        assert torch.equal(layers[name].B, B)
    fresh = find_layers(adapted(tiny_llama(), random_B=False, target_modules=TARGETS))
    restore_layout_(fresh, saved)
    _, other, _ = in_heads(r0=1)
    restore_layout_(other, saved)
    for found in (fresh, other):
        assert {name: layer.A.shape for name, layer in found.items()} == {n: A.shape for n, (A, _) in expected.items()}
        assert found[Q].head_ranks == (1, 0, 4, 2)
    restore_layout_(other, {})
    assert other[Q].groups is None
    trained = find_layers(adapted(tiny_llama(), target_modules=TARGETS))
    with pytest.raises(AdapterError, match="load the weights of the same checkpoint"):
        restore_layout_(trained, saved)
    with pytest.raises(AdapterError, match="was saved with"):
        restore_layout_(layers, {Q: (HeadGroups("rows", 2, 16), (4, 3))})
