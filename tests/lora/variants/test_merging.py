"""PEFT's merge while layers have gates or heads: the merged model is the live one, and the merge can be taken back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import lorank
from lorank.errors import AdapterError
from lorank.lora import AdapterLayers, find_layers, fold_gates_, fuse_, merge_heads_
from lorank.testing import plain_peft
from tests.lora.forms import in_heads, logits
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch
from tests.quantised import bnb4, bnb8

Form = Callable[[], tuple[PeftModel, AdapterLayers]]


def gate(layers: AdapterLayers) -> None:
    """Gates between −0.5 and 1.5; the first is zero."""
    values = torch.rand(layers.total_rank, generator=torch.Generator().manual_seed(2)) * 2 - 0.5
    values[0] = 0
    layers.learn_gates(values)


def gated(make: Callable[[], torch.nn.Module] = tiny_llama, *, fused: bool = False, **lora: object) -> Form:
    def form() -> tuple[PeftModel, AdapterLayers]:
        model = adapted(make(), **lora)  # type: ignore[arg-type]  # settings of a LoraConfig
        layers = find_layers(model)
        if fused:
            fuse_(layers)
        gate(layers)
        return model, layers

    return form


def heads(*, gates: bool) -> tuple[PeftModel, AdapterLayers]:
    model, layers, _ = in_heads()
    if gates:
        gate(layers)
    return model, layers


EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
FORMS: dict[str, Form] = {
    "gates": gated(),
    "gates, fused": gated(fused=True),
    "gates, rsLoRA": gated(use_rslora=True),
    "gates, DoRA": gated(use_dora=True),
    "gates, DoRA, fused": gated(use_dora=True, fused=True),
    "gates, Conv1D": gated(tiny_gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "gates, embedding": gated(**EMBEDDING),
    "gates, embedding, DoRA": gated(**EMBEDDING, use_dora=True),
    "gates, lora_bias": gated(target_modules=["c_attn"], make=tiny_gpt2, fan_in_fan_out=True, lora_bias=True),
    "heads": lambda: heads(gates=False),
    "heads, gates": lambda: heads(gates=True),
}


def base_weights(layers: AdapterLayers) -> list[Tensor]:
    return [layer.module.get_base_layer().weight.detach().clone() for layer in layers.values()]


@pytest.mark.parametrize("safe_merge", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("name", FORMS)
def test_the_merged_model_is_the_live_one_and_the_merge_can_be_taken_back(name: str, safe_merge: bool) -> None:
    model, layers = FORMS[name]()
    live, weights = logits(model), base_weights(layers)
    model.merge_adapter(safe_merge=safe_merge)
    merged = base_weights(layers)
    torch.testing.assert_close(logits(model), live, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(base_weights(layers), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model), live, rtol=1e-5, atol=1e-5)
    assert all(not torch.equal(one, other) for one, other in zip(merged, weights, strict=True))
    assert all("get_delta_weight" not in vars(layer.module) for layer in layers.values())
    unloaded = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(unloaded), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_merged_weights_are_those_of_the_plain_adapter(dtype: torch.dtype) -> None:
    model, layers = FORMS["heads, gates"]()
    model.to(dtype)
    plain = copy.deepcopy(model)
    fold_gates_(own := find_layers(plain))
    merge_heads_(own)
    plain.merge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(base_weights(layers), base_weights(own), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("make", [bnb4, bnb8])
def test_a_quantised_base_is_merged_with_its_gates(make: Callable[[], torch.nn.Module]) -> None:
    model = adapted(make())
    plain = copy.deepcopy(model)
    layers, own = find_layers(model), find_layers(plain)
    for some in (layers, own):
        gate(some)
    fold_gates_(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: merging into a quantised weight rounds it
        for one in (model, plain):
            one.merge_adapter()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_a_gate_per_sample_cannot_be_merged() -> None:
    model = adapted(tiny_llama())
    next(iter(find_layers(model).values())).gate = torch.ones(4, 4)
    with pytest.raises(AdapterError, match=r"a gate per sample, shape \(4, 4\)"):
        model.merge_adapter()


def in_plain_peft(folder: Path, adapter: str) -> Tensor:
    """The logits in a process without lorank."""
    if not (folder / "base").exists():
        tiny_llama().save_pretrained(folder / "base")
    return plain_peft().logits(folder / "base", folder / adapter, token_batch(padded=True))["logits"]


METHODS = {
    "SoRA": lorank.SoRA(prune_every=2),
    "ARDLoRA": lorank.ARDLoRA(alpha_lr=0.05, l1=0.02, resize_every=2, hold=1),
    "AdaLoRA": lorank.AdaLoRA(t_init=2, t_final=6, delta_t=2),
    "ALoRADNAS": lorank.ALoRADNAS(k1=4, k2=4, rounds=3, unit="steps", per_round=8, search_rows=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_after_a_merge(name: str, tmp_path: Path) -> None:
    """As a trainer does that hands merged weights to an inference server: merge, copy, take the merge back."""
    found = []
    for merges in (False, True):
        model = adapted(tiny_llama(), random_B=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ranks = lorank.attach(model, optimizer, METHODS[name], validation_batch=token_batch(seed=9), total_steps=16)
        for step in range(16):
            if merges and step % 3 == 2:
                live = logits(model)
                model.merge_adapter()
                torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-4)
                model.unmerge_adapter()
                model.train()
            model(**token_batch(seed=step % 3)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if merges and step == 8:  # while merged, the file of the adapter is that of the live ranks
                model.merge_adapter()
                ranks.save_adapter(tmp_path / "middle")
                torch.testing.assert_close(in_plain_peft(tmp_path, "middle"), logits(model), rtol=1e-4, atol=1e-4)
                model.unmerge_adapter()
                model.train()
        found.append(([record.ranks for record in ranks.history], logits(model)))
    ranks.save_adapter(tmp_path / "end")
    torch.testing.assert_close(in_plain_peft(tmp_path, "end"), found[1][1], rtol=1e-5, atol=1e-5)
    assert len(found[0][0]) > 2
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-3)


def test_a_run_whose_gates_were_folded_is_refused() -> None:
    """It would go on without gates, or end in an error without a message."""
    model = adapted(tiny_llama(), random_B=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(model, optimizer, lorank.AdaLoRA(t_init=2, t_final=6, delta_t=2), total_steps=16)
    fold_gates_(find_layers(model))
    model(**token_batch()).loss.backward()
    with pytest.raises(AdapterError, match=r"the gate of .*q_proj was removed .*fold_gates_ only after ranks.finish"):
        optimizer.step()
    assert ranks.step == 0


def test_a_step_while_merged_is_refused_and_the_remedy_works() -> None:
    """PEFT's merged layers pass no gradient to A and B, but gates would move."""
    model = adapted(tiny_llama(), random_B=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(model, optimizer, lorank.SoRA(prune_every=2), total_steps=16)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"is merged into the base weights.*Call model.unmerge_adapter\(\) before"):
        optimizer.step()
    assert ranks.step == 0
    model.unmerge_adapter()
    model(**token_batch()).loss.backward()
    optimizer.step()
    assert ranks.step == 1
