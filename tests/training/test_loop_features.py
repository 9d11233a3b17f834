"""What loops bring along: LoRA+ groups, averages of weights, streams, torch.compile, losses without logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments

import lorank
from tests.methods import METHODS
from tests.models import adapted, tiny_llama, token_batch
from tests.training.trainer_run import rows

STEPS = 12
TARGETS = ["q_proj", "v_proj", "down_proj"]
MakeOptimizer = Callable[[PeftModel], torch.optim.Optimizer]


def plain(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def lora_plus(ratio: float) -> MakeOptimizer:
    return lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio)


def run(
    method: str, make: MakeOptimizer = plain, each: Callable[[lorank.Ranks, PeftModel], None] = lambda *_: None
) -> tuple[PeftModel, lorank.Ranks]:
    model = adapted(tiny_llama(1), random_B=False, target_modules=TARGETS).train()
    optimizer = make(model)
    ranks = lorank.attach(
        model, optimizer, METHODS[method].make(), validation_batch=token_batch(seed=99), total_steps=STEPS
    )
    while ranks.step < STEPS:
        model(**token_batch(seed=ranks.step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        each(ranks, model)
    return model, ranks


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**token_batch(seed=5)).logits
    return found


@pytest.mark.parametrize("method", ["alora-first-order", "ard-heads", "balanced"])
def test_lora_plus_groups_keep_their_rates(method: str, tmp_path: Path) -> None:
    """With ratio 1 the run is AdamW's, bit for bit; with another one the groups' rates end as they began."""
    (one, _), (other, _) = run(method), run(method, lora_plus(1.0))
    assert torch.equal(logits(one), logits(other))
    model, ranks = run(method, lora_plus(8.0))
    rates = {id(p): group["lr"] for group in ranks.optimizer.param_groups for p in group["params"]}
    assert {rates[id(layer.A)] for layer in ranks.layers.values()} == {1e-2}
    assert {rates[id(layer.B)] for layer in ranks.layers.values()} == {8e-2}
    assert len({tuple(record.ranks.values()) for record in ranks.history}) > 1
    assert (logits(model) - logits(one)).abs().max() > 1e-3
    for layer in ranks.layers.values():
        for weight in (layer.A, layer.B) if method != "ard-heads" else ():  # its last step folds heads: a new state
            assert not weight.numel() or ranks.optimizer.state[weight]["exp_avg"].shape == weight.shape
    ranks.save_adapter(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_an_average_that_begins_after_the_last_move_is_that_of_the_weights() -> None:
    average, seen = [], []

    def each(ranks: lorank.Ranks, model: PeftModel) -> None:
        last = max(ranks.allocator.schedule(ranks.info))
        if ranks.step == last:
            average.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)))
        elif ranks.step > last:
            average[0].update_parameters(model)
            seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    _, ranks = run("balanced", each=each)
    assert len(seen) > 2
    expected = seen[0]  # the first update copies the weights
    for weights in seen[1:]:
        expected = {name: expected[name].lerp(weight, 0.5) for name, weight in weights.items()}
    found = dict(average[0].module.named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)
    layers = lorank.find_layers(average[0].module)
    assert layers.ranks == ranks.layers.ranks


def test_an_average_of_other_ranks_stops_with_an_error() -> None:
    """PyTorch cannot average weights of different shapes, and says so."""
    average: list[AveragedModel] = []

    def each(ranks: lorank.Ranks, model: PeftModel) -> None:
        if not average:
            average.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)))
        average[0].update_parameters(model)

    with pytest.raises(RuntimeError, match=r"size|shape"):
        run("balanced", each=each)


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows(4 * STEPS, seed=0))


def trainer_of(folder: Path, data: Any, callback: lorank.RankCallback, **changes: Any) -> Trainer:
    torch.manual_seed(3)
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    model = adapted(tiny_llama(1), random_B=False, target_modules=TARGETS)
    return Trainer(
        model, TrainingArguments(str(folder), **{**settings, **changes}), train_dataset=data, callbacks=[callback]
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["alora-first-order", "balanced, gradient start"])
def test_a_stream_with_batches_of_the_user(method: str, tmp_path: Path) -> None:
    if method == "alora-first-order":
        callback = lorank.RankCallback(METHODS[method].make(), validation_batch=token_batch(seed=9))
    else:
        callback = lorank.RankCallback(lorank.BalancedLoRA(), train_batches=[token_batch(seed=i) for i in range(2)])
    trainer_of(tmp_path, Stream(), callback).train()
    assert callback.ranks.finished
    assert len({tuple(record.ranks.values()) for record in callback.ranks.history}) > 1


def test_a_trainer_that_compiles_gives_the_same_losses_and_ranks(tmp_path: Path) -> None:
    method, found = lorank.ALoRA(k1=2, k2=1, rounds=1, unit="steps", per_round=4), []
    for compiled in (False, True):
        callback = lorank.RankCallback(method, validation_batch=token_batch(seed=9))
        compiling = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = trainer_of(tmp_path / str(compiled), rows(16, seed=0), callback, max_steps=4, **compiling)
        trainer.train()
        assert len({tuple(record.ranks.values()) for record in callback.ranks.history}) > 1
        found.append((losses_of(trainer), callback.ranks.layers.ranks))
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)


class WithoutLogits(nn.Module):
    """A model as liger kernels make it: with labels, loss and no logits, which are never computed as a whole."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        output = copy.copy(self.model(**batch))
        if "labels" in batch:
            output["logits"] = None
        return output


@pytest.mark.parametrize("method", ["alora", "alora-first-order", "balanced"])
def test_a_model_that_gives_no_logits_with_labels(method: str) -> None:
    """Scores, and so ranks, are those of the model that gives them."""
    ends = []
    for wrap in (lambda model: model, WithoutLogits):
        inner = adapted(tiny_llama(1), random_B=False, target_modules=TARGETS).train()
        model, optimizer = wrap(inner), plain(inner)
        ranks = lorank.attach(
            model, optimizer, METHODS[method].make(), validation_batch=token_batch(seed=99), total_steps=STEPS
        )
        while ranks.step < STEPS:
            model(**token_batch(seed=ranks.step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((ranks.layers.ranks, logits(inner)))
    assert ends[0][0] == ends[1][0]
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0, atol=1e-4)
