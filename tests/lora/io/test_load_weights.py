"""Weights of other ranks load into a live model, whoever loads them."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from lorank.errors import AdapterError
from lorank.lora import (
    AdapterLayers,
    LayerPlan,
    find_layers,
    padded,
    plan_for_heads,
    remove_stated_ranks_,
    resize_,
    resize_on_load,
    save_adapter,
)
from tests.lora.forms import OUT, TARGETS, Q, gated, in_heads, logits, plain_and_reserved
from tests.lora.optimizers import train_step
from tests.models import adapted, tiny_llama, token_batch


@pytest.mark.parametrize("target_modules", ["all-linear", ["embed_tokens", "q_proj", "v_proj"]])
def test_load_adapter_takes_the_ranks_of_the_file(tmp_path: Path, target_modules) -> None:
    saved = adapted(tiny_llama(), target_modules=target_modules).eval()
    layers = find_layers(saved)
    names = list(layers)
    resize_(layers, {names[0]: LayerPlan(()), names[1]: LayerPlan((0, 1, 2, 3), 5), names[2]: LayerPlan((3,))})
    with torch.no_grad():
        for layer in layers.values():
            layer.B.add_(0.01)
        expected = saved(**token_batch()).logits
    saved.save_pretrained(tmp_path)

    live = adapted(tiny_llama(), random_B=False, target_modules=target_modules).eval()
    live_layers = find_layers(live)
    # Two modules are at rank 0 here, one of them with ranks in the file.
    resize_(live_layers, {names[1]: LayerPlan(()), names[-1]: LayerPlan(())})
    handle = resize_on_load(live_layers)
    live.load_adapter(tmp_path, "default", is_trainable=True)
    assert live_layers.ranks == layers.ranks
    with torch.no_grad():
        assert torch.equal(live(**token_batch()).logits, expected)
    assert live.peft_config["default"].rank_pattern == saved.peft_config["default"].rank_pattern
    handle.remove()
    resize_(live_layers, {names[2]: LayerPlan((0,), 2)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        live.load_adapter(tmp_path, "default", is_trainable=True)


def test_a_whole_state_dict_loads_strictly_with_a_module_at_rank_0() -> None:
    saved, live = adapted(tiny_llama()), adapted(tiny_llama(), random_B=False)
    layers, live_layers = find_layers(saved), find_layers(live)
    resize_(layers, {next(iter(layers)): LayerPlan(())})
    resize_on_load(live_layers)
    live.load_state_dict(saved.state_dict(), strict=True)
    assert live_layers.ranks == layers.ranks


def test_weights_about_something_else_change_no_rank() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    resize_on_load(layers)
    model.load_state_dict({}, strict=False)
    assert set(layers.ranks.values()) == {4}


def test_the_optimisers_state_follows() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model(**token_batch()).loss.backward()
    optimizer.step()
    resize_on_load(layers, optimizer)
    other = adapted(tiny_llama(), r=6)
    model.load_state_dict(other.state_dict(), strict=False)
    for layer in layers.values():
        assert optimizer.state[layer.A]["exp_avg"].shape == layer.A.shape == (6, layer.d_in)
    optimizer.zero_grad()
    model(**token_batch()).loss.backward()
    optimizer.step()


def test_loading_the_live_weights_keeps_gates_and_others_bring_gates_of_one() -> None:
    model, layers, gates = gated()
    calls: list[int] = []
    resize_on_load(layers, on_new_weights=lambda: calls.append(1))
    own = {key: value.clone() for key, value in model.state_dict().items()}
    values, B = gates.values.clone(), {name: layer.B.detach().clone() for name, layer in layers.items()}
    model.load_state_dict(own)
    assert not calls
    assert torch.equal(layers.gates.values, values)
    assert all(torch.equal(layer.B, B[name]) for name, layer in layers.items())

    key = next(key for key in own if "lora_B" in key)
    model.load_state_dict({**own, key: own[key] + 1})
    assert calls
    assert torch.equal(layers.gates.values, torch.ones_like(values))
    for name, layer in layers.items():  # the folded weights, as they were in the dictionary
        saved = own[f"base_model.model.{name}.lora_B.default.weight"]
        assert torch.equal(layer.B, saved + 1 if name in key else saved)


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
    train_step(model, optimizer, token_batch())
    resize_on_load(layers, optimizer)
    model.load_state_dict(other.state_dict())
    assert layers[Q].head_ranks == (1, 0, 4, 2)
    assert layers[OUT].head_ranks == (0, 0, 3, 1)
    assert torch.equal(logits(model), logits(other))
    train_step(model.train(), optimizer, token_batch())


def test_weights_that_are_not_per_head_are_refused() -> None:
    model, layers, _ = in_heads()
    resize_on_load(layers)
    plain = adapted(tiny_llama(), target_modules=TARGETS, r=8)
    with pytest.raises(AdapterError, match="do not have this form"):
        model.load_state_dict(plain.state_dict())


def test_weights_of_other_ranks_fill_the_pool(tmp_path: Path) -> None:
    plain, roomy = plain_and_reserved()
    layers = find_layers(plain)
    ranks = dict(zip(layers, [0, 1, 2, 3, 5, 6, 7] * 2, strict=True))
    plan = {name: LayerPlan(tuple(range(min(4, rank))), max(0, rank - 4)) for name, rank in ranks.items()}
    resize_(layers, plan)
    for layer in layers.values():
        torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(layer.rank))
    handle = resize_on_load(find_layers(roomy))
    roomy.load_state_dict(plain.state_dict())
    handle.remove()
    assert find_layers(roomy).ranks == ranks
    batch = token_batch()
    assert torch.allclose(plain(**batch).logits, roomy(**batch).logits, atol=1e-14, rtol=0)
    save_adapter(find_layers(roomy), tmp_path / "roomy")
    saved = load_file(tmp_path / "roomy" / "adapter_model.safetensors")
    assert sorted(len(value) for key, value in saved.items() if "lora_A" in key) == sorted(
        r for r in ranks.values() if r
    )


FORMS: dict[str, Any] = {
    "plain": lambda: (model := adapted(tiny_llama()), find_layers(model)),
    "gated": lambda: gated()[:2],
    "per head": lambda: in_heads()[:2],
    "reserved": lambda: (model := plain_and_reserved()[1], find_layers(model)),
}
"""A model and its layers, in every form of a layer."""


def move_ranks(layers: AdapterLayers) -> None:
    """Takes all ranks from the first layer, and one from the second."""
    empty, smaller = list(layers)[:2]
    if layers[empty].groups is None:
        plan = {empty: LayerPlan(()), smaller: LayerPlan(tuple(range(layers[smaller].rank - 1)))}
    else:
        ranks = {empty: (0, 0, 0, 0), smaller: (1, *layers[smaller].head_ranks[1:])}
        plan = {name: plan_for_heads(layers[name].head_ranks, wanted) for name, wanted in ranks.items()}
    resize_(layers, plan)
    for layer in layers.values():
        if layer.pool is not None:  # as DeepSpeed's backend does after a resize
            for stored, live, axis in zip(layer.stored, (layer.A, layer.B), (0, 1), strict=True):
                stored.data.copy_(padded(live, axis, layer.pool.capacity))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "AveragedModel"])
def test_a_copy_loads_weights_into_itself_and_leaves_the_model_alone(form: str, copied: str) -> None:
    model, layers = FORMS[form]()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    calls: list[int] = []
    resize_on_load(layers, optimizer, on_new_weights=lambda: calls.append(1))
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "AveragedModel":
        other = AveragedModel(model).module
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    then, its_own = logits(model), copy.deepcopy(other.state_dict())
    assert torch.equal(logits(other), then)
    if layers.gates is not None:  # the copy has gates of its own
        with torch.no_grad():
            layers.gates.values.mul_(0.5)
        assert torch.equal(logits(other), then)
    move_ranks(layers)
    ranks, now = layers.ranks, logits(model)
    gates = None if layers.gates is None else layers.gates.values.clone()

    other.load_state_dict(model.state_dict())
    assert find_layers(other).ranks == ranks
    assert torch.allclose(logits(other), now, atol=1e-6)
    other.load_state_dict(its_own)
    assert torch.allclose(logits(other), then, atol=1e-6)
    assert layers.ranks == ranks
    assert torch.equal(logits(model), now)
    assert gates is None or torch.equal(layers.gates.values, gates)
    assert not calls


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_some_modules_leave_the_others_alone(form: str, caplog: pytest.LogCaptureFixture) -> None:
    model, layers = FORMS[form]()
    move_ranks(layers)
    handle = resize_on_load(layers)
    own = get_peft_model_state_dict(model)
    some = {key: value.clone() for key, value in own.items() if "layers.1" in key}
    before = {name: (x.A.detach().clone(), x.B.detach().clone(), x.gate, x.head_ranks) for name, x in layers.items()}
    values = None if layers.gates is None else layers.gates.values.clone()
    expected = logits(model)
    set_peft_model_state_dict(model, some)
    assert torch.equal(logits(model), expected)  # the weights that it has already
    assert values is None or torch.equal(layers.gates.values, values)
    assert "say nothing about" in caplog.text

    set_peft_model_state_dict(model, {key: value * 2 for key, value in some.items()})
    for name, (A, B, gate, head_ranks) in before.items():
        layer = layers[name]
        assert layer.head_ranks == head_ranks
        if "layers.1" not in name:
            assert torch.equal(layer.A, A)
            assert torch.equal(layer.B, B)
            assert gate is None or torch.equal(layer.gate, gate)
        elif form != "per head":
            assert torch.equal(layer.A, 2 * A)
            assert gate is None or (layer.gate == 1).all()
    handle.remove()


def test_one_factor_alone_changes_no_rank() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    resize_on_load(layers)
    B = {key: value + 1 for key, value in model.state_dict().items() if "lora_B" in key}
    model.load_state_dict(B, strict=False)
    assert set(layers.ranks.values()) == {4}
    for name, layer in layers.items():
        assert torch.equal(layer.B, B[f"base_model.model.{name}.lora_B.default.weight"])
    other = adapted(tiny_llama(), r=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({k: v for k, v in other.state_dict().items() if "lora_B" in k}, strict=False)


def test_rank_0_is_taken_from_what_states_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = adapted(tiny_llama())
    layers = find_layers(saved)
    move_ranks(layers)
    saved.save_pretrained(tmp_path)

    def live() -> tuple[PeftModel, AdapterLayers]:
        model = adapted(tiny_llama(), random_B=False)
        found = find_layers(model)
        resize_on_load(found)
        return model, found

    model, found = live()
    model.load_adapter(tmp_path, "default")
    assert found.ranks == layers.ranks
    model, found = live()
    torch.nn.ModuleDict({"inner": model}).load_state_dict(torch.nn.ModuleDict({"inner": saved}).state_dict())
    assert found.ranks == layers.ranks
    assert torch.equal(logits(model), logits(saved))
    assert "say nothing about" not in caplog.text
    model, found = live()
    set_peft_model_state_dict(model, get_peft_model_state_dict(saved))  # states nothing
    empty = next(iter(layers))
    assert found.ranks == {**layers.ranks, empty: 4}
    assert f"1 of 14 modules ({empty})" in caplog.text
    assert "model.load_adapter" in caplog.text
    remove_stated_ranks_(found, tmp_path)
    assert found.ranks == layers.ranks
    assert torch.equal(logits(model), logits(saved))
    remove_stated_ranks_(found, tmp_path / "nowhere")
    assert found.ranks == layers.ranks


def test_a_folder_of_an_adapter_of_fewer_modules_leaves_the_others_alone(tmp_path: Path) -> None:
    adapted(tiny_llama(), target_modules=["q_proj"], r=2).save_pretrained(tmp_path)
    model = adapted(tiny_llama())
    layers = find_layers(model)
    handle = resize_on_load(layers)
    model.load_adapter(str(tmp_path), adapter_name="default", is_trainable=True)
    assert layers.ranks == {name: 2 if "q_proj" in name else 4 for name in layers}
    handle.remove()
    assert "load_adapter" not in vars(model)
    assert not model._load_state_dict_pre_hooks


def test_a_merged_copy_loads_as_without_lorank() -> None:
    model = adapted(tiny_llama())
    resize_on_load(find_layers(model))
    teacher = copy.deepcopy(model)
    teacher.merge_adapter()
    teacher.load_state_dict(teacher.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        teacher.load_state_dict(adapted(tiny_llama(), r=2).state_dict())
