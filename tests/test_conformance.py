"""What every method must do, on a causal language model, an encoder and a vision transformer."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import lorank
from lorank.allocators import Allocation
from lorank.errors import AdapterError
from lorank.lora import LayerPlan, plan_for_heads
from lorank.training import Ranks
from tests.elsewhere import Case, reload
from tests.methods import METHODS, STEPS, Method
from tests.models import adapted, class_batch, digit_batch, tiny_bert, tiny_llama, tiny_vit, token_batch


@dataclass(frozen=True)
class Model:
    """A model, batches for it (by number), and how it is loaded again."""

    make: Callable[[], PreTrainedModel]
    batch: Callable[[int], dict[str, Tensor]]
    auto: str


MODELS = {
    "causal": Model(tiny_llama, lambda i: token_batch(seed=i, padded=True), "AutoModelForCausalLM"),
    "encoder": Model(tiny_bert, lambda i: class_batch(length=6 + i % 3), "AutoModelForSequenceClassification"),
    "vision": Model(tiny_vit, lambda i: digit_batch(first=4 * i), "AutoModelForImageClassification"),
}
BUDGETS = {
    "ranks per module": 2,
    "ranks": "31 ranks",
    "parameters": "1900 params",
    "bytes": {"bytes": 7000},
    "server": {"ranks_per_module": 3, "max_lora_rank": 4},
}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def fresh(model: Model, method: Method, **lora: Any) -> PeftModel:
    peft_model = adapted(model.make(), random_B=False, **{**method.lora, **lora})
    return peft_model.train()


class Loop:
    """A training loop as a user writes one."""

    def __init__(self, model: Model, method: Method, budget: Any = None, steps: int = STEPS, **lora: Any) -> None:
        self.kind = model
        self.model = fresh(model, method, **lora)
        self.optimizer = optimizer_of(self.model)
        self.ranks: Ranks = lorank.attach(
            self.model, self.optimizer, method.make(budget), validation_batch=model.batch(99), total_steps=steps, seed=7
        )
        self.losses: list[float] = []

    def run(self, until: int) -> Loop:
        while self.ranks.step < until:
            torch.manual_seed(self.ranks.step)  # for dropout
            loss = self.model(**self.kind.batch(self.ranks.step)).loss
            loss.backward()
            self.losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def logits(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            logits = self.model(**self.kind.batch(50)).logits
        self.model.train()
        return logits


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@every_method
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("causal", name) for name in BUDGETS), ("encoder", "server"), ("vision", "parameters")],
)
def test_the_run_ends_at_or_under_its_budget(kind: str, name: str, method: Method) -> None:
    budget: Any = BUDGETS[name]
    loop = Loop(MODELS[kind], method, budget).run(STEPS)
    # A rank of a head costs what it trains, which the finished adapter no longer shows.
    limits = loop.ranks.budget if method.heads else lorank.Budget.parse(budget).resolve(loop.ranks.layers)
    ranks = loop.ranks.layers.ranks
    assert limits.fits(ranks)
    # nor is most of it left unused
    assert not limits.fits({name: 3 * rank for name, rank in ranks.items()})
    assert loop.ranks.layers.gates is None
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


@every_method
def test_two_runs_of_one_seed_are_the_same(method: Method) -> None:
    first, second = (Loop(MODELS["causal"], method).run(STEPS) for _ in range(2))
    assert first.losses == second.losses
    assert [r.ranks for r in first.ranks.history] == [r.ranks for r in second.ranks.history]
    same(first.model.state_dict(), second.model.state_dict())


@every_model
@every_method
def test_a_resumed_run_is_the_uninterrupted_one(model: Model, method: Method, tmp_path: Path) -> None:
    """After ranks have moved, from files, into a model made anew, weights or optimiser first; bitwise."""
    whole = Loop(model, method).run(STEPS // 2 + 1)
    torch.save(whole.model.state_dict(), tmp_path / "model.pt")
    torch.save(whole.optimizer.state_dict(), tmp_path / "optimizer.pt")
    whole.run(STEPS)

    for order in (("model", "optimizer"), ("optimizer", "model")):
        resumed = Loop(model, method)
        for part in order:
            getattr(resumed, part).load_state_dict(torch.load(tmp_path / f"{part}.pt", weights_only=True))
        assert resumed.ranks.step == STEPS // 2 + 1
        resumed.run(STEPS)
        assert resumed.losses == whole.losses[STEPS // 2 + 1 :]
        same(resumed.model.state_dict(), whole.model.state_dict())
        assert resumed.ranks.history[-1].ranks == whole.ranks.history[-1].ranks


@every_model
@every_method
def test_ranks_whose_gate_is_zero_come_and_go_unseen(model: Model, method: Method) -> None:
    loop = Loop(model, method).run(STEPS // 2)
    ranks = loop.ranks
    layers = ranks.layers
    before = loop.logits()
    # new ranks, in every module that has room, and away with them again: B = 0 beneath them, whatever their gate
    old, heads = layers.ranks, {name: layer.head_ranks for name, layer in layers.items()}

    def plan(name: str, new: int) -> LayerPlan:
        if layers[name].groups is not None:
            return plan_for_heads(layers[name].head_ranks, [heads[name][0] + new, *heads[name][1:]])
        return LayerPlan(tuple(range(old[name])), new)

    room = [name for name, layer in layers.items() if layer.rank < layer.max_rank and layer.head_ranks[0] < 8]
    ranks._carry_out(Allocation({name: plan(name, 1) for name in room}), ranks._context(), 0.0)
    torch.testing.assert_close(loop.logits(), before, rtol=1e-5, atol=1e-6)
    ranks._carry_out(Allocation({name: plan(name, 0) for name in room}), ranks._context(), 0.0)
    assert layers.ranks == old
    torch.testing.assert_close(loop.logits(), before, rtol=1e-5, atol=1e-6)
    loop.run(STEPS)
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


def test_what_is_saved_at_any_moment_is_plain_and_exact(tmp_path: Path) -> None:
    """All methods on all models, while training and at its end, in one process that never imports lorank."""
    cases, expected = [], []
    for (label, method), (kind, model) in itertools.product(METHODS.items(), MODELS.items()):
        name = f"{label}-{kind}"
        base = tmp_path / kind
        if not base.exists():
            model.make().save_pretrained(base)
        loop = Loop(model, method)
        for step in (STEPS // 2, STEPS):
            loop.run(step)
            adapter = tmp_path / name / f"adapter-{step}"
            loop.model.save_pretrained(adapter)
            batch = tmp_path / name / "batch.pt"
            torch.save({key: v for key, v in model.batch(50).items() if key != "labels"}, batch)
            cases.append(
                Case(str(base), str(adapter), str(batch), str(tmp_path / name / f"out-{step}.pt"), auto=model.auto)
            )
            expected.append(loop.logits())
    for case, found, logits in zip(cases, reload(cases, tmp_path), expected, strict=True):
        torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
        torch.testing.assert_close(found["merged"], logits, rtol=1e-4, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")


def rows_of(model: Model, count: int) -> list[dict[str, Tensor]]:
    """Rows of one length, as a Trainer's own data set returns them."""
    batches = [model.batch(3 * i) for i in range(count)]
    return [{key: value[k] for key, value in batch.items()} for batch in batches for k in range(len(batch["labels"]))]


@every_model
@every_method
def test_the_trainer_trains_saves_and_resumes_exactly(model: Model, method: Method, tmp_path: Path) -> None:
    rows = rows_of(model, 6)

    def trainer(folder: str) -> tuple[Trainer, lorank.RankCallback]:
        callback = lorank.RankCallback(method.make(), validation_batch=model.batch(99))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=STEPS // 2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            seed=3,
        )
        torch.manual_seed(0)
        peft_model = fresh(model, method, lora_dropout=0.1)
        return Trainer(peft_model, arguments, train_dataset=rows, callbacks=[callback]), callback

    whole, callback = trainer("run")
    whole.train()
    assert callback.ranks is not None
    resumed, again = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{STEPS // 2}"))
    assert again.ranks is not None
    same(resumed.model.state_dict(), whole.model.state_dict())
    assert again.ranks.layers.ranks == callback.ranks.layers.ranks

    base = model.make()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / f"checkpoint-{STEPS}")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**model.batch(50)).logits, whole.model.eval()(**model.batch(50)).logits, rtol=1e-5, atol=1e-6
        )


@every_method
def test_with_dora(method: Method, tmp_path: Path) -> None:
    if method.heads:
        with pytest.raises(AdapterError, match="no per-head form: keep one rank per module with heads='module'"):
            Loop(MODELS["causal"], method, use_dora=True)
        return
    loop = Loop(MODELS["causal"], method, use_dora=True).run(STEPS)
    loop.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["causal"].make(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**loop.kind.batch(50)).logits, loop.logits(), rtol=1e-5, atol=1e-6)
    assert min(loop.ranks.layers.ranks.values()) >= 1


@every_method
def test_with_rank_stabilised_scaling(method: Method, tmp_path: Path) -> None:
    loop = Loop(MODELS["causal"], method, use_rslora=True).run(STEPS)
    loop.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["causal"].make(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**loop.kind.batch(50)).logits, loop.logits(), rtol=1e-5, atol=1e-6)


@every_method
def test_settings_and_state_can_be_written_down(method: Method) -> None:
    import json

    loop = Loop(MODELS["causal"], method).run(STEPS // 2)
    json.dumps(loop.ranks.allocator.describe())
    buffer = io.BytesIO()
    torch.save(loop.optimizer.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    assert copy.deepcopy(loop.ranks.allocator) == loop.ranks.allocator
