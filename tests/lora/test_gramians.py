"""The sums of z zᵀ and ẑ ẑᵀ against a twin that keeps every z, and takes its gradient by autograd."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lorank.lora import AdapterLayers, Gramians, find_layers, fuse_, unfuse_
from lorank.lora.kernels.dora import fused_dora, row_norms
from lorank.lora.kernels.lora import fused_lora
from lorank.lora.kernels.sparse_dropout import Dropout
from lorank.scoring import measure_gramians
from tests.lora.kernels.operands import S, dropping, operands
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch

Sums = Mapping[str, tuple[Tensor, Tensor, int]]

MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "llama": (lambda: adapted(tiny_llama()), token_batch),
    "bert": (lambda: adapted(tiny_bert()), class_batch),
    "conv1d": (
        lambda: adapted(tiny_gpt2(), fan_in_fan_out=True, target_modules=["c_attn", "c_fc", "c_proj"]),
        token_batch,
    ),
    "embedding": (lambda: adapted(tiny_llama(), target_modules=["embed_tokens", "v_proj", "down_proj"]), token_batch),
    "dora": (lambda: adapted(tiny_llama(), use_dora=True), token_batch),
    "dora of an embedding": (
        lambda: adapted(tiny_llama(), use_dora=True, target_modules=["embed_tokens"]),
        token_batch,
    ),
    "bias": (
        lambda: adapted(tiny_llama(attention_bias=True), lora_bias=True, target_modules=["q_proj", "o_proj"]),
        token_batch,
    ),
    "rslora": (lambda: adapted(tiny_llama(), use_rslora=True), token_batch),
}


def twin_sums(model: nn.Module, passes: list[Callable[[], Tensor]]) -> Sums:
    """Every z is kept; its gradient is that of the sum of all losses."""
    layers = find_layers(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():
        keep = seen[name].append
        if layer.is_embedding:
            plain = layer.module._embed

            def embed(*arguments: Any, plain: Any = plain, keep: Any = keep, **options: Any) -> Tensor:
                z: Tensor = plain(*arguments, **options)
                keep(z)
                return z

            layer.module._embed = embed
        else:
            hook = lambda _, __, z, keep=keep: keep(z) if z.requires_grad else None  # noqa: E731
            handles.append(layer.module.lora_A["default"].register_forward_hook(hook))
    losses = [one() for one in passes]
    for handle in handles:
        handle.remove()
    every = [z for zs in seen.values() for z in zs]
    gradients = dict(zip(map(id, every), torch.autograd.grad(sum(losses), every, allow_unused=True), strict=True))
    found = {}
    for name, zs in seen.items():
        layers[name].module.__dict__.pop("_embed", None)
        pairs = [(z.detach(), gradients[id(z)]) for z in zs if gradients[id(z)] is not None]
        z = torch.cat([one.flatten(0, -2).double() for one, _ in pairs])  # (tokens, r)
        dz = torch.cat([one.flatten(0, -2).double() for _, one in pairs])
        starts = torch.tensor([0, *(one.shape[:-1].numel() for one, _ in pairs)]).cumsum(0).tolist()
        counted = [
            start + i
            for start, (_, part) in zip(starts, pairs, strict=False)
            for i, one in enumerate(part.flatten(0, -2))
            if one.abs().max() > 1e-6 * part.abs().max()  # zero up to rounding
        ]
        Z = sum((torch.outer(z[i], z[i]) for i in counted), torch.zeros(z.shape[1], z.shape[1]).double())
        D = sum((torch.outer(one, one) for one in dz), torch.zeros(z.shape[1], z.shape[1]).double())
        found[name] = (Z, D, len(counted))
    return found


def same(gramians: Gramians, expected: Sums, rtol: float = 1e-9) -> None:
    assert gramians.sums.keys() == expected.keys()
    for name, (Z, D, tokens) in expected.items():
        own = gramians.sums[name]
        assert own.Z is not None
        assert own.D is not None
        assert own.tokens is not None
        torch.testing.assert_close(own.Z.double(), Z, rtol=rtol, atol=rtol * float(Z.abs().max()))
        torch.testing.assert_close(own.D.double(), D, rtol=rtol, atol=rtol * float(D.abs().max()))
        assert int(own.tokens) == tokens
        assert float(D.abs().max()) > 0


@contextmanager
def collecting(model: nn.Module, *, fused: bool) -> Iterator[tuple[AdapterLayers, Gramians]]:
    """The layers in the form of a run; afterwards as they were."""
    layers = find_layers(model)
    if fused:
        fuse_(layers)
    before = hooks_of(model)
    gramians = Gramians(layers)
    try:
        yield layers, gramians
    finally:
        gramians.remove()
        assert hooks_of(model) == before
        unfuse_(layers)


def hooks_of(model: nn.Module) -> list[Any]:
    return [(name, len(module._forward_hooks), "_embed" in vars(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_sums_are_those_of_a_twin_that_keeps_everything(kind: str, fused: bool) -> None:
    """Two backward passes, of which one has padding."""
    make, batch = MODELS[kind]
    model = make().double().train()
    batches = [batch(padded=True), {key: value.flip(0) for key, value in batch().items()}]

    def one_pass(number: int) -> Tensor:
        torch.manual_seed(number)  # of the base model's dropout
        loss: Tensor = model(**batches[number]).loss
        return loss

    expected = twin_sums(model, [lambda: one_pass(0), lambda: one_pass(1)])
    assert min(tokens for _, _, tokens in expected.values()) > 0
    assert max(tokens for _, _, tokens in expected.values()) < 80, "nothing was padded"
    with collecting(model, fused=fused) as (_, gramians):
        for number in range(2):
            one_pass(number).backward()
        same(gramians, expected)


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_under_gradient_checkpointing(fused: bool, reentrant: bool) -> None:
    model = adapted(tiny_llama()).double().train()
    expected = twin_sums(model, [lambda: model(**token_batch()).loss])
    base = model.base_model.model
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with collecting(model, fused=fused) as (_, gramians):
        model(**token_batch()).loss.backward()
        same(gramians, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_with_nn_dropout(dora: bool) -> None:
    model = adapted(tiny_llama(), lora_dropout=0.4, use_dora=dora).double().train()

    def one() -> Tensor:
        torch.manual_seed(3)
        return model(**token_batch()).loss

    expected = twin_sums(model, [one])
    with collecting(model, fused=False) as (_, gramians):
        one().backward()
        same(gramians, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_with_fused_dropout(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its z lacks the factor 1 / (1 − p), which its ẑ has in turn: Z D and the σ² are those of nn.Dropout."""
    p = 0.4
    model = (
        adapted(tiny_llama(1), lora_dropout=p, use_dora=dora, target_modules=["q_proj", "down_proj"]).double().train()
    )
    masks: list[Tensor] = []
    plain = Dropout.__call__

    def noted(self: Dropout, x: Tensor, p: float) -> Any:
        dropped = plain(self, x, p)
        mask = torch.ones_like(x).view(-1)
        mask[dropped.positions] = 0
        masks.append(mask.view_as(x))
        return dropped

    monkeypatch.setattr(Dropout, "__call__", noted)
    with collecting(model, fused=True) as (_, gramians):
        loss = model(**token_batch()).loss
        loss.backward()
        found = {name: (own.Z.clone(), own.D.clone()) for name, own in gramians.sums.items()}  # type: ignore[union-attr]

    class Again(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.mask = mask

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mask / (1 - p)

    for layer, mask in zip(find_layers(model).values(), masks, strict=True):
        layer.module.lora_dropout["default"] = Again(mask)
    expected = twin_sums(model, [lambda: model(**token_batch()).loss])
    torch.testing.assert_close(model(**token_batch()).loss, loss, rtol=1e-12, atol=0)
    for name, (Z, D) in found.items():
        torch.testing.assert_close(Z @ D, expected[name][0] @ expected[name][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
def test_under_autocast_the_sums_are_in_float32(fused: bool) -> None:
    model = adapted(tiny_llama()).train()
    expected = twin_sums(model, [lambda: model(**token_batch()).loss])
    with collecting(model, fused=fused) as (_, gramians):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**token_batch()).loss
        loss.backward()
        for name, (Z, D, tokens) in expected.items():
            own = gramians.sums[name]
            assert own.Z is not None
            assert own.D is not None
            assert own.Z.dtype == own.D.dtype == torch.float32
            assert int(own.tokens) == tokens  # type: ignore[arg-type]
            assert torch.linalg.norm(own.Z - Z) < 0.05 * torch.linalg.norm(Z)
            assert torch.linalg.norm(own.D - D) < 0.1 * torch.linalg.norm(D)


class Twice(nn.Module):
    """One linear map that is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(torch.tanh(self.linear(x))).square().mean()
        return output


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
def test_a_module_that_is_called_twice_counts_twice(fused: bool) -> None:
    model = get_peft_model(Twice(), LoraConfig(r=3, target_modules=["linear"])).double().train()  # type: ignore[arg-type]
    with torch.no_grad():
        next(iter(find_layers(model).values())).B.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = twin_sums(model, [lambda: model(x)])
    with collecting(model, fused=fused) as (_, gramians):
        model(x).backward()
        same(gramians, expected)
    assert [tokens for _, _, tokens in expected.values()] == [10]


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
def test_what_is_no_pass_of_training_does_not_count(fused: bool) -> None:
    model = adapted(tiny_llama(), target_modules=["embed_tokens", "v_proj"]).double().train()
    expected = twin_sums(model, [lambda: model(**token_batch()).loss])
    with collecting(model, fused=fused) as (layers, gramians):
        model.eval()
        model(**token_batch(seed=1)).loss.backward()  # an evaluation with gradients
        assert all(own.Z is None for own in gramians.sums.values())
        model.train()
        with torch.no_grad():
            model(**token_batch(seed=2))
        model(**token_batch(seed=3))  # without a backward pass
        model(**token_batch()).loss.backward()
        gramians.collecting = False
        assert not gramians.collecting
        model(**token_batch(seed=4)).loss.backward()
        same(gramians, expected)
        gramians.collecting = True
        measure_gramians(model, layers, [token_batch(seed=5)])  # which watches the same layers meanwhile
        same(gramians, expected)
        gramians.clear()
        model(**token_batch()).loss.backward()
        same(gramians, expected)


def test_a_run_s_sums_do_not_depend_on_the_form_in_which_a_pass_runs() -> None:
    """Watching follows the layers from PEFT's forward to the fused one and back."""
    model = adapted(tiny_llama()).double().train()
    expected = twin_sums(model, [lambda: model(**token_batch()).loss])
    layers = find_layers(model)
    gramians = Gramians(layers)
    for change in (fuse_, unfuse_, lambda _: None):
        change(layers)
        gramians.watch()
        gramians.clear()
        model(**token_batch()).loss.backward()
        same(gramians, expected)
    gramians.remove()
    assert all(own.Z is None for own in gramians.sums.values())


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_adds_to_no_sums(fused: bool, how: str) -> None:
    model = adapted(tiny_llama(), target_modules=["embed_tokens", "v_proj"]).double().train()
    with collecting(model, fused=fused) as (_, gramians):
        model(**token_batch()).loss.backward()
        before = {name: (own.Z, own.D) for name, own in gramians.sums.items()}
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        loss = copied.train()(**token_batch(seed=1)).loss
        loss.backward()
        torch.testing.assert_close(loss, model(**token_batch(seed=1)).loss, rtol=1e-12, atol=0)
        for name, own in gramians.sums.items():
            assert own.Z is before[name][0]
            assert own.D is before[name][1]
        model(**token_batch(seed=1)).loss.backward()
        assert all(own.Z is not before[name][0] for name, own in gramians.sums.items())


def test_a_gradient_scaler_s_factor_is_removed() -> None:
    model = adapted(tiny_llama()).double().train()
    expected = twin_sums(model, [lambda: model(**token_batch()).loss])
    with collecting(model, fused=True) as (_, gramians):
        (model(**token_batch()).loss * 1024).backward()
        gramians.unscale(1024)
        same(gramians, expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_kernel_that_records_computes_the_same_bits(dora: bool, gated: bool, p: float) -> None:
    found = []
    recorded: list[tuple[Tensor, Tensor]] = []
    for record in (None, lambda z, dz: recorded.append((z.clone(), dz.clone()))):
        o = operands(2, 4)
        x, A, B, W = o["x"], o["A"], o["B"], o["W"]
        gate, dropped = o["gate"] if gated else None, dropping(o["x"], p)
        inputs = [x, A, B, *([o["gate"]] if gated else [])]
        result = torch.nn.functional.linear(x, W, o["bias"])
        if dora:
            norm = row_norms(W, W.square().sum(1), A, B, S, gate)
            output = fused_dora(
                result, x, A, B, gate, S, o["magnitude"], W, o["bias"], norm, dropped=dropped, record=record
            )
            inputs.append(o["magnitude"])
        else:
            output = fused_lora(result, x, A, B, gate, S, W=W, dropped=dropped, record=record)
        found.append([output, *torch.autograd.grad((output * output.detach().cos()).sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    ((z, dz),) = recorded
    assert z.shape == dz.shape == (3, 8)
    torch.testing.assert_close(
        found[0][2], torch.autograd.grad((A @ (dropped.x if dropped else x).reshape(-1, 6).T * dz).sum(), A)[0]
    )


@pytest.mark.parametrize("kind", ["llama", "embedding", "dora"])
def test_collecting_leaves_losses_and_gradients_as_they_are(kind: str) -> None:
    make, batch = MODELS[kind]
    found = []
    for watched in (False, True):
        model = make().train()
        fuse_(find_layers(model))
        gramians = Gramians(find_layers(model)) if watched else None
        loss = model(**batch()).loss
        loss.backward()
        assert gramians is None or all(own.Z is not None for own in gramians.sums.values())
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
