"""Whole models with the fused forward equal PEFT's own: loss and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from lorank.lora import LayerPlan, find_layers, resize_
from lorank.lora.kernels.sparse_dropout import Dropout
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.gated import GatedLora, expand_gate
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch

MODELS = {
    "llama": (tiny_llama, token_batch, {}),
    "bert": (tiny_bert, class_batch, {}),
    "gpt2": (tiny_gpt2, token_batch, {"fan_in_fan_out": True}),
}


class Gated(LoraVariant):
    """A gate over the fused forward, as the layer will have it."""

    def __init__(self, fused: FusedLora, gate: Tensor) -> None:
        self.fused, self.gate = fused, gate

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return self.fused.gated(module, active_adapter, x, result, self.gate, expand_gate)


def model_of(name: str, **lora: Any) -> tuple[Any, Any]:
    make, batch, settings = MODELS[name]
    model = adapted(make(), **settings, **lora)
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if "magnitude" in parameter_name:  # as if it had been trained
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    return model.double(), batch(padded=True)


def fuse(model: Any, *, shared: bool = True) -> None:
    dropout = Dropout(shared=shared)
    for layer in find_layers(model).values():
        layer.module.lora_variant["default"] = FusedLora(dropout, layer.module.lora_variant.get("default"))


def gradients(model: Any, batch: Any, more: tuple[Tensor, ...] = ()) -> list[Tensor]:
    loss = model(**batch).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, [*trained, *more])]


def same(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-9) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_equals_peft(name: str, dora: bool) -> None:
    model, batch = model_of(name, use_dora=dora)
    model.eval()
    expected = gradients(model, batch)
    fuse(model)
    same(gradients(model, batch), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_equal_the_reference(dora: bool, per_sample: bool) -> None:
    model, batch = model_of("llama", use_dora=dora)
    layers = find_layers(model)
    samples = (len(batch["input_ids"]),) if per_sample else ()
    gates = {
        name: torch.rand(*samples, layer.rank, dtype=torch.float64).requires_grad_() for name, layer in layers.items()
    }
    own = {name: layer.module.lora_variant.get("default") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.module.lora_variant["default"] = GatedLora(gates[name], own[name])
    expected = gradients(model, batch, tuple(gates.values()))
    for name, layer in layers.items():
        layer.module.lora_variant["default"] = Gated(FusedLora(Dropout(), own[name]), gates[name])
    same(gradients(model, batch, tuple(gates.values())), expected)


@pytest.mark.parametrize(("shared", "draws"), [(True, 8), (False, 14)])
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_drawn_once_for_q_k_and_v_or_for_each(
    dora: bool, shared: bool, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 blocks of q, k, v, o, gate, up, down; shared by (q, k, v) and (gate, up)."""
    model, batch = model_of("llama", use_dora=dora, lora_dropout=0.5)
    model.train()
    drawn: list[Any] = []
    plain = Dropout.__call__
    monkeypatch.setattr(Dropout, "__call__", lambda self, x, p: drawn.append(plain(self, x, p)) or drawn[-1])
    fuse(model, shared=shared)
    model(**batch)
    assert len(drawn) == 14
    assert len({id(one) for one in drawn}) == draws


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_equals_peft_on_average(dora: bool) -> None:
    """PEFT's own forward is without dropout in evaluation; in training, both have the same mean."""
    torch.manual_seed(0)
    model, _ = model_of("llama", use_dora=dora, lora_dropout=0.1, target_modules=["down_proj"])
    theirs, ours = copy.deepcopy(model), model
    fuse(ours)

    def outputs(one: Any) -> Tensor:
        layer = one.train().base_model.model.model.layers[0].mlp.down_proj
        x = torch.linspace(-1, 1, layer.in_features, dtype=torch.float64).expand(20_000, -1)
        with torch.no_grad():
            return layer(x)  # (20000, d_out)

    a, b = outputs(ours), outputs(theirs)
    noise = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()  # (d_out,)
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * noise).all()
    torch.testing.assert_close(a.var(0), b.var(0), rtol=0.1, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_dropout_again(reentrant: bool) -> None:
    model, batch = model_of("llama", lora_dropout=0.3)
    fuse(model)
    model.train()
    model.enable_input_require_grads()

    def trained() -> list[Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = trained()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    same(trained(), expected)


def test_an_output_that_a_hook_received_is_not_overwritten() -> None:
    model, batch = model_of("llama")
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    shown: list[tuple[Tensor, Tensor]] = []
    base.register_forward_hook(lambda _, __, output: shown.append((output, output.detach().clone())))
    expected = gradients(model, batch)
    shown.clear()
    fuse(model)
    same(gradients(model, batch), expected)
    assert torch.equal(*shown[0])


def test_a_trained_base_bias_keeps_its_gradient() -> None:
    model, batch = model_of("bert", bias="all")
    model.eval()
    expected = gradients(model, batch)
    fuse(model)
    same(gradients(model, batch), expected)


@pytest.mark.parametrize("lora", [{"lora_bias": True}, {"r": 1}, {"use_rslora": True}])
def test_other_forms_of_lora(lora: dict[str, Any]) -> None:
    model, batch = model_of("bert", **lora)
    model.eval()
    expected = gradients(model, batch)
    fuse(model)
    same(gradients(model, batch), expected)


def test_two_adapters_at_once() -> None:
    """The second adapter's result is not the frozen map's alone: the first one's gradients must survive."""
    model, batch = model_of("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.double()
    model.base_model.set_adapter(["default", "other"])
    expected = gradients(model, batch)
    dropout = Dropout()
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            module.lora_variant.update(default=FusedLora(dropout), other=FusedLora(dropout))
    same(gradients(model, batch), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_equals_peft(dora: bool, safe: bool) -> None:
    model, batch = model_of("llama", use_dora=dora)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        fuse(model)
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-12)
        model.unmerge_adapter()
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_is_close_to_peft(dora: bool) -> None:
    model, batch = model_of("llama", use_dora=dora)
    model.float()

    def lower() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, batch)

    expected = lower()
    fuse(model)
    for our, their in zip(lower(), expected, strict=True):
        assert our.dtype == their.dtype
        assert torch.linalg.norm(our.float() - their.float()) < 0.05 * torch.linalg.norm(their.float()) + 1e-6


def test_a_base_weight_that_changes_changes_dora_s_norm() -> None:
    model, batch = model_of("llama", use_dora=True)
    model.eval()
    theirs = copy.deepcopy(model)
    fuse(model)
    with torch.no_grad():
        model(**batch)
        for one in (model, theirs):
            for name, parameter in one.named_parameters():
                if "base_layer" in name:
                    parameter.mul_(2)
        torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=1e-9, atol=1e-12)


def test_under_torch_compile_the_plain_formula_runs() -> None:
    model, batch = model_of("llama")
    expected = gradients(model, batch)
    fuse(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    same(gradients(compiled, batch), expected)
    torch.compiler.reset()


def test_ranks_move_under_the_fused_forward() -> None:
    """A module at rank 0 is its base layer; the others go on with what they kept."""
    model, batch = model_of("llama")
    layers = find_layers(model)
    fuse(model)
    gradients(model, batch)
    first, second, *_ = layers
    resize_(layers, {first: LayerPlan(()), second: LayerPlan((1, 3), 2)})
    found = gradients(model, batch)
    for layer in layers.values():
        layer.module.lora_variant.clear()
    same(found, gradients(model, batch))
    assert layers.ranks[first] == 0
