"""Ranks in a pool of fixed shape: the model is what it was, and dead ranks stay dead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import lorank
from lorank.lora import LayerPlan, find_layers, resize_, resize_on_load, save_adapter
from lorank.scoring import ablation_scores
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch

ROOM = 7


def pair() -> tuple[PeftModel, PeftModel]:
    """A model in float64, and the same with room for more ranks."""
    plain, roomy = (adapted(tiny_llama()).double().eval() for _ in range(2))
    return plain, lorank.reserve_(roomy, ROOM)


def test_reserving_ranks_changes_neither_outputs_nor_saved_files(tmp_path: Path) -> None:
    plain, roomy = pair()
    batch = token_batch()
    assert torch.allclose(plain(**batch).logits, roomy(**batch).logits, atol=1e-14, rtol=0)
    layers = find_layers(roomy)
    assert layers.ranks == find_layers(plain).ranks
    for layer in layers.values():
        assert [tuple(weight.shape) for weight in layer.stored] == [(ROOM, layer.d_in), (layer.d_out, ROOM)]
    plain.save_pretrained(str(tmp_path / "plain"))
    roomy.save_pretrained(str(tmp_path / "roomy"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("roomy", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_dead_ranks_have_no_gradient_and_take_no_step() -> None:
    plain, roomy = pair()
    for model, weights in ((plain, find_layers(plain)), (roomy, find_layers(roomy))):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
        for step in range(10):
            model(**token_batch(seed=step)).loss.backward()
            for layer in weights.values():
                if layer.pool is not None:
                    assert not layer.stored[0].grad[layer.rank :].any()
                    assert not layer.stored[1].grad[:, layer.rank :].any()
            optimizer.step()
            optimizer.zero_grad()
    for layer, twin in zip(find_layers(roomy).values(), find_layers(plain).values(), strict=True):
        A, B = layer.stored
        assert not A[layer.rank :].any()
        assert not B[:, layer.rank :].any()
        # Not to the last bit: transformers' norms are in float32, and Adam divides small numbers by small ones.
        assert torch.allclose(A[: layer.rank], twin.A, atol=1e-5)
        assert torch.allclose(B[:, : layer.rank], twin.B, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_have_one_entry_per_live_rank(per_sample: bool) -> None:
    plain, roomy = pair()
    batch = token_batch()
    generator = torch.Generator().manual_seed(0)
    for layer, twin in zip(find_layers(roomy).values(), find_layers(plain).values(), strict=True):
        shape = (len(batch["input_ids"]), layer.rank) if per_sample else (layer.rank,)
        layer.gate = twin.gate = torch.rand(shape, generator=generator, dtype=torch.float64)
    assert torch.allclose(plain(**batch).logits, roomy(**batch).logits, atol=1e-14, rtol=0)


def test_ablation_gives_the_same_scores() -> None:
    plain, roomy = pair()
    ours, theirs = (ablation_scores(model, find_layers(model), token_batch()) for model in (roomy, plain))
    assert theirs.scores.keys() == ours.scores.keys()
    for name, scores in theirs.scores.items():
        assert torch.allclose(ours.scores[name], scores, atol=1e-6)


def test_weights_of_other_ranks_fill_the_pool(tmp_path: Path) -> None:
    plain, roomy = pair()
    layers = find_layers(plain)
    ranks = dict(zip(layers, [0, 1, 2, 3, 5, 6, 7] * 2, strict=True))
    plan = {name: LayerPlan(tuple(range(min(4, rank))), max(0, rank - 4)) for name, rank in ranks.items()}
    resize_(layers, plan)
    for layer in layers.values():
        torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(layer.rank))
    weights = {key: value for key, value in plain.state_dict().items() if "lora_" in key}
    handle = resize_on_load(find_layers(roomy))
    roomy.load_state_dict(weights, strict=False)
    handle.remove()
    assert find_layers(roomy).ranks == ranks
    batch = token_batch()
    assert torch.allclose(plain(**batch).logits, roomy(**batch).logits, atol=1e-14, rtol=0)
    save_adapter(find_layers(roomy), tmp_path / "roomy")
    saved = load_file(tmp_path / "roomy" / "adapter_model.safetensors")
    assert sorted(len(value) for key, value in saved.items() if "lora_A" in key) == sorted(
        r for r in ranks.values() if r
    )


def test_layers_that_cannot_reserve_ranks_are_refused() -> None:
    with pytest.raises(lorank.LorankError, match="has 4 ranks; give at least 4"):
        lorank.reserve_(adapted(tiny_llama()), 3)
    with pytest.raises(lorank.LorankError, match="uses DoRA"):
        lorank.reserve_(adapted(tiny_llama(), use_dora=True), 8)
    with pytest.raises(lorank.LorankError, match="is an embedding"):
        lorank.reserve_(adapted(tiny_gpt2(), target_modules=["wte"]), 8)
    model = lorank.reserve_(adapted(tiny_llama()), 8)
    with pytest.raises(lorank.LorankError, match="8 reserved ranks already"):
        lorank.reserve_(model, 8)
    layers = find_layers(model)
    name = next(iter(layers))
    with pytest.raises(lorank.LorankError, match="at most the reserved 8 ranks"):
        resize_(layers, {name: LayerPlan((0, 1, 2, 3), 5)})
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(lorank.LorankError, match="leave out reserve_"):
        lorank.attach(model, optimizer, lorank.SoRA(), total_steps=10)
