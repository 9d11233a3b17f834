"""Runs whose layers are fused are the runs that PEFT's own forward gives, and leave stock PEFT layers behind."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lorank
from lorank.lora.kernels.onednn import FrozenLinear
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.gated import GatedLora
from tests.messages import warnings_of_lorank
from tests.methods import METHODS, Method
from tests.models import adapted, class_batch, tiny_bert, tiny_llama, token_batch

STEPS = 24


@pytest.fixture
def in_double() -> Iterator[None]:
    """Learned gates too are float64 then."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fused_layers(layers: lorank.AdapterLayers) -> int:
    variants = [layer.module.lora_variant.get("default") for layer in layers.values()]
    return sum(isinstance(v.replaced if isinstance(v, GatedLora) else v, FusedLora) for v in variants)


def run(method: Method, *, fused: bool, **lora: Any) -> tuple[lorank.Ranks, list[Tensor]]:
    """The run and its losses; gates and all weights along the way in the losses' list too."""
    model = adapted(tiny_bert(), random_B=False, **{**method.lora, **lora}).double()
    model.eval()  # without the base model's own dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(
        model, optimizer, method.make(), validation_batch=class_batch(8), total_steps=STEPS, seed=7, fused=fused
    )
    expected = sum(layer.groups is None for layer in ranks.layers.values())
    assert fused_layers(ranks.layers) == (expected if fused else 0)
    seen: list[Tensor] = []
    while ranks.step < STEPS:
        loss = model(**class_batch(4, 5 + ranks.step % 4, padded=True)).loss
        loss.backward()
        seen.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if ranks.step == STEPS // 2:
            if ranks.layers.gates is not None:
                seen.append(ranks.layers.gates.values.clone())
            seen += [p.detach().clone() for p in model.parameters() if p.requires_grad]
            seen += [value for state in optimizer.state.values() for value in state.values()]
    return ranks, [*seen, *model.state_dict().values()]


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize(
    ("name", "dora"), [*((name, False) for name in METHODS), ("alora", True), ("adalora", True), ("ard", True)]
)
def test_a_fused_run_equals_the_plain_run(name: str, dora: bool) -> None:
    """float64, whole tensors: losses, weights, moments, gates, over every reallocation."""
    (ours, our), (theirs, their) = (run(METHODS[name], fused=fused, use_dora=dora) for fused in (True, False))
    assert [record.ranks for record in ours.history] == [record.ranks for record in theirs.history]
    looser = (
        100 if name == "balanced" else 1
    )  # a basis of eigenvectors depends on the last bits more than a choice does
    for a, b in zip(our, their, strict=True):
        torch.testing.assert_close(a, b, rtol=looser * 1e-7, atol=looser * 1e-9)
    assert not fused_layers(ours.layers)


def test_heads_share_the_fused_layers_dropout_during_the_run() -> None:
    """Two blocks of q, k, v, o (heads), gate, up, down: a draw for (q, k, v) and one for (gate, up)."""
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ranks = lorank.attach(model, optimizer, METHODS["ard-heads"].make(), total_steps=4)
    heads = [layer.form for layer in ranks.layers.values() if layer.groups is not None]
    fused = [layer.module.lora_variant["default"].replaced for layer in ranks.layers.values() if layer.groups is None]
    assert len(heads) == 8
    assert {id(one.dropout) for one in (*heads, *fused)} == {id(heads[0].dropout)}
    drawn: list[Any] = []
    draw = heads[0].dropout.__call__

    class Watched(type(heads[0].dropout)):  # type: ignore[misc]
        def __call__(self, x: Tensor, p: float) -> Any:
            drawn.append(draw(x, p))
            return drawn[-1]

    heads[0].dropout.__class__ = Watched
    model.train()
    model(**token_batch()).loss.backward()
    assert len(drawn) == 14
    assert len({id(one) for one in drawn}) == 8
    optimizer.step()
    optimizer.step()  # ranks move: heads are made anew
    assert all(layer.form.dropout is heads[0].dropout for layer in ranks.layers.values() if layer.groups is not None)
    ranks.detach()
    assert all(layer.form.dropout is None for layer in ranks.layers.values() if layer.groups is not None)


def llama_run(allocator: lorank.Allocator, **settings: Any) -> tuple[Any, torch.optim.Optimizer, lorank.Ranks]:
    lora = settings.pop("lora", {})
    model = settings.pop("model", None) or adapted(tiny_llama(), **lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(model, optimizer, allocator, total_steps=6, validation_batch=token_batch(seed=9), **settings)
    return model, optimizer, ranks


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(seed=3)).logits


@pytest.mark.parametrize("dora", [False, True])
def test_copies_and_files_of_a_fused_model_are_complete(dora: bool, tmp_path: Path) -> None:
    model, _, ranks = llama_run(lorank.SoRA(), lora={"use_dora": dora, "lora_dropout": 0.1})
    model(**token_batch()).loss.backward()
    ranks.layers.gates.values.mul_(0.7)
    before = logits(model)
    assert fused_layers(ranks.layers) == 14
    assert torch.equal(logits(copy.deepcopy(model)), before)
    model.save_pretrained(tmp_path)
    again = adapted(tiny_llama(), use_dora=dora)
    again.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-6)
    ranks.detach()
    assert fused_layers(ranks.layers) == 0


def test_a_fused_layer_can_be_pickled() -> None:
    model, _, ranks = llama_run(lorank.StaticLoRA())
    model(**token_batch()).loss.backward()
    layer = next(iter(ranks.layers.values())).module
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(2, 3, 32)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


@pytest.mark.parametrize("dora", [False, True])
def test_merging_while_fused(dora: bool) -> None:
    model, *_ = llama_run(lorank.StaticLoRA(), lora={"use_dora": dora})
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("static", {}),
        ("static", {"use_dora": True}),
        ("static", {"lora_dropout": 0.1}),
        ("ard-heads", {"random_B": False}),
    ],
    ids=["LoRA", "DoRA", "dropout", "heads"],
)
def test_frozen_base_layers_use_the_faster_product_during_the_run(method: str, lora: dict[str, Any]) -> None:
    def kinds(layers: lorank.AdapterLayers) -> set[type]:
        return {type(layer.module.get_base_layer()) for layer in layers.values()}

    plain, *_, ranks = llama_run(METHODS[method].make(), lora=lora, fused=False)
    assert kinds(ranks.layers) == {torch.nn.Linear}
    model, _, ranks = llama_run(METHODS[method].make(), lora=lora)
    assert kinds(ranks.layers) == {FrozenLinear}
    for one in (plain, model):
        one.eval()(**token_batch(), use_cache=False).loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) >= 28
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    ranks.finish() if method == "ard-heads" else ranks.detach()
    assert kinds(ranks.layers) == {torch.nn.Linear}


@pytest.mark.parametrize("end", ["finish", "detach"])
def test_the_end_restores_stock_layers(end: str) -> None:
    model, _, ranks = llama_run(lorank.StaticLoRA())
    assert fused_layers(ranks.layers) == 14
    before = logits(model)
    getattr(ranks, end)()
    assert not any(layer.module.lora_variant for layer in ranks.layers.values())
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_gradient_accumulation_and_checkpointing_and_autocast_as_the_plain_run() -> None:
    def losses(fused: bool) -> list[float]:
        model, optimizer, ranks = llama_run(lorank.ALoRA(k1=2, k2=2, rounds=2, unit="steps"), fused=fused)
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        found = []
        while ranks.step < 6:
            for part in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=ranks.step % 2 == 1):
                    loss = model(**token_batch(seed=2 * ranks.step + part)).loss
                loss.backward()
                found.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-2)


def test_a_compiled_model_keeps_pefts_forward() -> None:
    compiled = adapted(tiny_llama())
    compiled.compile(backend="eager")
    with warnings_of_lorank() as messages:
        _, _, ranks = llama_run(lorank.StaticLoRA(), model=compiled)
    assert fused_layers(ranks.layers) == 0
    assert any("14 for torch.compile" in message for message in messages)


@pytest.mark.parametrize("fused", [True, False])
def test_the_trainer_fuses_while_it_trains(fused: bool, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(lorank.RankCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            assert self.ranks is not None
            seen.append(fused_layers(self.ranks.layers))

    rows = [{key: value[0] for key, value in token_batch(1, seed=i).items()} for i in range(8)]
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True)
    callback = Watch(lorank.StaticLoRA(), fused=fused)
    trainer = Trainer(adapted(tiny_llama()), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.ranks is not None
    assert seen == [14 if fused else 0, 14 if fused else 0, 0]  # the run ends with its last step
    assert not any(layer.module.lora_variant for layer in callback.ranks.layers.values())


def test_a_resumed_run_is_fused_until_it_ends() -> None:
    _, optimizer, ranks = llama_run(lorank.StaticLoRA())
    state = optimizer.state_dict()
    ranks.finish()
    finished = optimizer.state_dict()
    _, optimizer, ranks = llama_run(lorank.StaticLoRA())
    optimizer.load_state_dict(finished)
    assert fused_layers(ranks.layers) == 0
    optimizer.load_state_dict(state)
    assert fused_layers(ranks.layers) == 14
