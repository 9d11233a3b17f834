"""A LoRA per head on stock PEFT layers: fresh layers take the form, train and resize in it, and leave it plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lorank.errors import AdapterError, PlanError
from lorank.lora import (
    AdapterLayers,
    HeadGroups,
    LayerPlan,
    find_layers,
    fold_gates_,
    head_groups,
    merge_heads_,
    plan_for_heads,
    resize_,
    resize_on_load,
    restore_layout_,
    save_adapter,
    split_into_heads_,
)
from lorank.scoring import ablation_scores
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch

Q, OUT, DOWN = (f"model.layers.0.{end}" for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def in_heads(
    base: PreTrainedModel | None = None, r0: int = 2, **lora: Any
) -> tuple[PeftModel, AdapterLayers, torch.optim.Optimizer]:
    """A model whose projections have ``r0`` ranks per head, B random."""
    model = adapted(base or tiny_llama(), random_B=False, **{"target_modules": TARGETS, **lora})
    layers = find_layers(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    split_into_heads_(layers, head_groups(layers), optimizer, r0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * 0.2
    return model, layers, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    model(**token_batch(seed=seed)).loss.backward()
    optimizer.step()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(padded=True)).logits


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


def test_merging_heads_keeps_the_output_and_gives_a_stock_peft_model() -> None:
    model, layers, optimizer = in_heads()
    step(model, optimizer)
    layers.learn_gates(torch.linspace(0.5, 1.5, layers.total_rank))
    expected = logits(model)
    fold_gates_(layers)
    merge_heads_(layers, optimizer)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    q = layers[Q]
    assert not q.module.lora_variant
    assert (q.A.shape, q.B.shape) == ((8, 32), (32, 8))
    assert model.peft_config["default"].rank_pattern[r"^model\.layers\.0\.self_attn\.q_proj"] == 8
    step(model.train(), optimizer)  # the optimiser goes on
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_merging_in_per_head_form_is_refused() -> None:
    model, _, _ = in_heads()
    with pytest.raises(AdapterError, match="per-head form, which PEFT cannot merge"):
        model.merge_adapter()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_heads_grow_and_shrink_with_their_moments(data: st.DataObject) -> None:
    """New ranks change nothing; kept ones keep value and moments bitwise, in head order."""
    model, layers, optimizer = in_heads()
    for _ in range(2):
        step(model.train(), optimizer)
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
    ("plan", "said"),
    [
        (LayerPlan((0, 1, 2)), "must give the ranks of its 4 heads"),
        (LayerPlan((0, 1, 2), head_ranks=(1, 1, 1, 1)), "3 in total"),
        (LayerPlan((0, 1, 2), head_ranks=(1, 1, 1, 0)), "moves a rank to another head"),
        (LayerPlan((1, 0), head_ranks=(1, 1, 0, 0)), "moves a rank to another head"),
        (LayerPlan((), 9, head_ranks=(9, 0, 0, 0)), "can hold at most 8 ranks; the plan asks for 9"),
        (LayerPlan((0,), 1, places=(2,), head_ranks=(2, 0, 0, 0)), "placed at"),
    ],
)
def test_plans_that_do_not_fit_the_heads_are_refused(plan: LayerPlan, said: str) -> None:
    _, layers, _ = in_heads()
    before = layers[Q].A.data.clone()
    with pytest.raises(PlanError, match=said):
        resize_(layers, {Q: plan})
    assert torch.equal(layers[Q].A, before)


def test_a_plain_layer_has_no_ranks_of_heads() -> None:
    _, layers, _ = in_heads()
    with pytest.raises(PlanError, match="not in per-head form"):
        resize_(layers, {DOWN: plan_for_heads([4], [2])})


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


@pytest.mark.parametrize("gated", [True, False])
def test_weights_of_the_same_layers_load_bitwise(gated: bool) -> None:
    model, layers, _ = in_heads()
    if gated:
        layers.learn_gates(torch.linspace(0.5, 1.5, layers.total_rank))
    resize_on_load(layers)
    before = {name: (x.A.data.clone(), x.B.data.clone(), x.head_ranks) for name, x in layers.items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    resize = {Q: plan_for_heads(layers[Q].head_ranks, [1, 3, 0, 2])} if not gated else {}
    resize_(layers, resize)
    model.load_state_dict(weights)
    for name, (A, B, ranks) in before.items():
        assert torch.equal(layers[name].A, A)
        assert torch.equal(layers[name].B, B)
        assert layers[name].head_ranks == ranks


def test_weights_of_other_ranks_change_the_head_ranks() -> None:
    model, layers, optimizer = in_heads()
    other, others, _ = in_heads()
    resize_(others, {Q: plan_for_heads((2, 2, 2, 2), (1, 0, 4, 2)), OUT: plan_for_heads((2, 2, 2, 2), (0, 0, 3, 1))})
    others[Q].B.data[:, 3:5] = torch.rand(8, 2)  # the new ranks of head 2 trained a little
    step(model, optimizer)
    resize_on_load(layers, optimizer)
    model.load_state_dict(other.state_dict())
    assert layers[Q].head_ranks == (1, 0, 4, 2)
    assert layers[OUT].head_ranks == (0, 0, 3, 1)
    assert torch.equal(logits(model), logits(other))
    step(model.train(), optimizer)


def test_weights_that_are_not_per_head_are_refused() -> None:
    model, layers, _ = in_heads()
    resize_on_load(layers)
    plain = adapted(tiny_llama(), target_modules=TARGETS, r=8)
    with pytest.raises(AdapterError, match="do not have this form"):
        model.load_state_dict(plain.state_dict())


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


def test_find_layers_finds_layers_in_per_head_form() -> None:
    model, layers, _ = in_heads()
    again = find_layers(model)
    assert again[Q].head_ranks == layers[Q].head_ranks
    assert again[OUT].groups == HeadGroups("columns", 4, 8)


def test_scores_in_per_head_form_equal_those_of_the_equivalent_plain_lora() -> None:
    model, layers, _ = in_heads()
    batch = token_batch(padded=True)
    found = ablation_scores(model, layers, batch, engine="exact")
    assert found.engine == "exact", found.notice
    merge_heads_(layers)
    plain = ablation_scores(model, layers, batch, engine="reference")
    for name, scores in plain.scores.items():
        torch.testing.assert_close(found.scores[name], scores, rtol=1e-4, atol=1e-5)
