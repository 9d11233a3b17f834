"""Every method on the layers that are no Linear: GPT-2's Conv1D, Embedding, convolutions, plain and with DoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorank
from tests.convolutions import KINDS as CONVOLUTIONS
from tests.convolutions import MERGED, WITH_DORA, conv_net, picture_batch
from tests.methods import METHODS, STEPS, Method
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning",
)


@dataclass(frozen=True)
class Kind:
    """A base model, and how layers of one kind in it are adapted.

    Args:
        part: of the names of the layers in question.
        batch: makes a batch, by its seed.
        without_dora: targets that have no DoRA.
        unmerged: targets that PEFT cannot merge.
    """

    make: Callable[[], Any]
    lora: dict[str, Any]
    part: str
    batch: Callable[..., dict[str, torch.Tensor]] = token_batch
    without_dora: frozenset[str] = frozenset()
    unmerged: frozenset[str] = frozenset()


KINDS = {
    "Conv1D": Kind(tiny_gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}, "h."),
    "Conv": Kind(
        conv_net,
        {"target_modules": [*CONVOLUTIONS, "head"]},
        "",
        picture_batch,
        frozenset(CONVOLUTIONS).difference(WITH_DORA),
        frozenset(CONVOLUTIONS).difference(MERGED),
    ),
    "Embedding": Kind(tiny_llama, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}, "embed_tokens"),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ranks_move_and_what_is_saved_is_plain_peft(kind: Kind, dora: bool, method: Method, tmp_path: Path) -> None:
    if dora and method.heads:
        pytest.skip("DoRA has no form with ranks per head: tests/lora/kernels/test_per_head.py")
    torch.manual_seed(0)
    lora = {**method.lora, **kind.lora}
    if method in (METHODS["adalora"], METHODS["balanced"]) and "embed_tokens" in lora["target_modules"]:
        lora["target_modules"] = ["embed_tokens"]  # beside others it keeps all its ranks
    if dora:
        lora["target_modules"] = [target for target in lora["target_modules"] if target not in kind.without_dora]
    model = adapted(kind.make(), random_B=False, use_dora=dora, **lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    batch = kind.batch(seed=99)
    ranks = lorank.attach(model, optimizer, method.make(), validation_batch=batch, total_steps=STEPS, seed=7)
    while ranks.step < STEPS:
        model(**kind.batch(seed=ranks.step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own = [name for name in ranks.layers if kind.part in name]
    assert own
    if method is not METHODS["static"]:
        seen = {tuple(record.ranks[name] for name in own) for record in ranks.history}
        assert len(seen) > 1, "no layer of this kind changed its rank"
    assert any(ranks.layers[name].B.any() for name in own), "none has been trained"
    model.eval()
    with torch.no_grad():
        after = model(**batch).logits
    lorank.save_adapter(ranks.layers, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(kind.make(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, after, rtol=1e-5, atol=1e-5)
        if not kind.unmerged.isdisjoint(lora["target_modules"]):
            return  # tests/lora/variants/test_convolution.py
        merged = plain.merge_and_unload()(**batch).logits
    torch.testing.assert_close(merged, after, rtol=1e-4, atol=1e-4)
