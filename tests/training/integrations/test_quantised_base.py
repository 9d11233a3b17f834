"""Every method on every kind of quantised base that a CPU can run: trained, evaluated meanwhile, saved, merged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import lorank
from lorank.errors import AdapterError
from lorank.lora import prevent_repacking
from lorank.training import Ranks
from tests.methods import DORA, STEPS, WITH_DORA, Method
from tests.models import adapted, token_batch
from tests.quantised import BASES, bnb8, torchao8

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module to .-bit linear:UserWarning",
    "ignore:.*cast from torch.float32 to float16:UserWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


TARGETS = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]

# "alora-retry" differs from "alora" in what it decides, not in what it asks of a base.
SOME = {name: method for name, method in WITH_DORA.items() if name != "alora-retry"}


def logits_of(model: torch.nn.Module) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**token_batch(seed=50)).logits
    model.train(was_training)
    return logits


def reload(base: PreTrainedModel, folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(base, str(folder))
    prevent_repacking(model)  # else bitsandbytes evaluates it in bfloat16
    return model


class Loop:
    def __init__(self, model: PeftModel, method: Method) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        self.ranks: Ranks = lorank.attach(
            model, self.optimizer, method.make(), validation_batch=token_batch(seed=99), total_steps=STEPS, seed=7
        )

    def run(self, until: int) -> Loop:
        while self.ranks.step < until:
            loss = self.model(**token_batch(seed=self.ranks.step % 4)).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def distance(one: Tensor, other: Tensor, moved: float) -> float:
    """As a part of how far training has moved the output."""
    return float((one - other).norm()) / moved


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("method", SOME.values(), ids=SOME)
def test_a_method_trains_and_what_it_saves_and_merges_is_what_it_trained(base, method: Method, tmp_path: Path) -> None:
    if method is DORA and base is bnb8:
        with pytest.raises(AdapterError, match="DoRA over bitsandbytes' int8 fails on a CPU"):
            Loop(adapted(base(), use_dora=True), method)
        return
    torch.manual_seed(0)
    plain = logits_of(base())
    loop = Loop(adapted(base(), random_B=False, target_modules=TARGETS, **method.lora), method).run(STEPS // 2 + 1)
    before = logits_of(loop.model)  # an evaluation between two steps
    loop.model(**token_batch(seed=3)).loss.backward()
    for name, layer in loop.ranks.layers.items():
        assert not layer.rank or layer.B.grad.any(), f"{name} gets no gradient after an evaluation"
    loop.optimizer.zero_grad()
    gated = any(layer.gate is not None or layer.groups for layer in loop.ranks.layers.values())
    loop.model.save_pretrained(tmp_path / "half")
    reloaded = reload(base(), tmp_path / "half")
    if gated and base is torchao8:  # PEFT's merge would leave out what the variant adds
        with pytest.raises(AdapterError, match=r"End the run first \(ranks.finish\(\)\)"):
            copy.deepcopy(loop.model).merge_and_unload()
    elif gated:
        moved = float((before - plain).norm())
        merged, expected = (copy.deepcopy(model).merge_and_unload() for model in (loop.model, reloaded))
        assert distance(logits_of(merged), logits_of(expected), moved) < 2e-2
    # bitsandbytes' int8 rounds activations, which a last bit may tip over; the others multiply in float32.
    close = 1e-2 if base is bnb8 else 1e-5
    assert distance(logits_of(reloaded), before, float((before - plain).norm())) < close

    loop.run(STEPS)
    after = logits_of(loop.model)
    loop.model.save_pretrained(tmp_path / "end")
    reloaded = reload(base(), tmp_path / "end")
    moved = float((after - plain).norm())
    assert distance(logits_of(reloaded), after, moved) < close
    loop.ranks.detach()
    if method is DORA and base is torchao8:
        with pytest.raises(AdapterError, match="without its DoraLinearVariant"):
            loop.model.merge_and_unload()
        return
    merged = logits_of(loop.model.merge_and_unload())
    assert distance(merged, after, moved) < 0.4  # merged weights are rounded again
    assert distance(merged, logits_of(reloaded.merge_and_unload()), moved) < 2e-2
