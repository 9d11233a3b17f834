"""Any loop that calls optimizer.step() allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import lorank
from lorank.errors import AdapterError, ScheduleError
from tests.models import adapted, tiny_bert, tiny_llama, token_batch
from tests.training.loops import QUICK, adamw


def test_a_five_line_loop_allocates() -> None:
    model, data = adapted(tiny_llama(), lora_dropout=0.1), [token_batch(seed=seed) for seed in range(8)]
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(seed=99), total_steps=8)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in ranks.history] == [0, 2, 4, 6]
    assert len(set(ranks.layers.ranks.values())) > 1
    assert ranks.layers.total_rank <= 14 * 4
    for before, record in zip(ranks.history, ranks.history.allocations, strict=False):
        assert sum(map(len, record.pruned.values())) == 6
        for name, rank in record.ranks.items():
            change = record.added.get(name, 0) - len(record.pruned.get(name, []))
            assert rank == before.ranks[name] + change
            assert len(record.scores[name]) == before.ranks[name]
        assert record.details["engine"] == "exact"
        assert record.parameters == sum(record.ranks[n] * sum(record.shapes[n]) for n in record.ranks)


def test_allocation_leaves_the_output_as_pruning_alone_does() -> None:
    """New ranks have B = 0: the loss moves by what was pruned, and by nothing else."""
    model = adapted(tiny_llama()).double().eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    ranks = lorank.attach(
        model, optimizer, lorank.ALoRA(k1=1, unit="steps"), validation_batch=token_batch(), total_steps=3
    )
    twin = adapted(tiny_llama()).double().eval()
    model(**token_batch()).loss.backward()
    optimizer.step()
    layers = lorank.find_layers(twin)
    for name, gone in ranks.history[1].pruned.items():
        layers[name].B.data[:, list(gone)] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(**token_batch()).loss, twin(**token_batch()).loss, rtol=1e-10, atol=0)


def test_accelerates_wrapped_optimiser_allocates() -> None:
    accelerator = Accelerator(cpu=True)
    model = adapted(tiny_llama())
    model, optimizer = accelerator.prepare(model, adamw(model))
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=4)
    for seed in range(4):
        accelerator.backward(model(**token_batch(seed=seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in ranks.history] == [0, 2]


def test_the_users_own_loss_and_scheduler_and_clipping() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)

    def my_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(input_ids=batch["input_ids"]).logits.pow(2).mean()

    ranks = lorank.attach(
        model,
        optimizer,
        QUICK,
        validation_batch={"input_ids": token_batch()["input_ids"]},
        total_steps=4,
        loss_fn=my_loss,
    )
    for seed in range(4):
        my_loss(model, token_batch(seed=seed)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert ranks.history[1].details["engine"] == "reference"
    assert ranks.history[1].details["notice"]


# Resume: a loop that keeps weights and optimiser has kept everything.


def accelerated(folder: Path | None, first: int) -> tuple[Accelerator, lorank.Ranks, list[float]]:
    """SoRA in accelerate's loop from step ``first``, which empties modules; resumed from ``folder`` if there is one."""
    accelerator = Accelerator(cpu=True)
    model = adapted(tiny_llama(), random_B=False)
    model, optimizer = accelerator.prepare(model, adamw(model))
    ranks = lorank.attach(model, optimizer, lorank.SoRA(prune_every=2), total_steps=12)
    if folder is not None:
        accelerator.load_state(str(folder))
    losses = []
    for seed in range(first, 12 if folder is not None else 10):
        loss = model(**token_batch(seed=seed)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return accelerator, ranks, losses


def test_accelerates_saved_state_resumes_across_modules_at_rank_0(tmp_path: Path) -> None:
    """accelerate keeps the whole model in safetensors, whose tensors must state rank 0."""
    accelerator, ranks, _ = accelerated(None, 0)
    assert 0 in ranks.layers.ranks.values()
    accelerator.save_state(str(tmp_path))
    model, optimizer = ranks.layers.model, ranks.optimizer
    expected = []
    for seed in (10, 11):
        loss = model(**token_batch(seed=seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    _, resumed, losses = accelerated(tmp_path, 10)
    assert losses == expected
    assert resumed.layers.ranks == ranks.layers.ranks
    for name, layer in ranks.layers.items():
        assert torch.equal(resumed.layers[name].A, layer.A)
        assert torch.equal(resumed.layers[name].B, layer.B)


# Bad input, and runs in which nothing happens.


class TestErrors:
    def test_a_model_without_an_adapter(self) -> None:
        model = tiny_bert()
        with pytest.raises(AdapterError, match="no LoRA layer found"):
            lorank.attach(model, torch.optim.SGD(model.parameters()), QUICK, validation_batch={}, total_steps=10)

    def test_a_budget_that_one_round_would_use_up(self) -> None:
        model = adapted(tiny_llama(), r=1)
        with pytest.raises(ScheduleError, match="would prune n_A = 14"):
            lorank.attach(
                model, adamw(model), lorank.ALoRA(per_round=14), validation_batch=token_batch(), total_steps=10
            )
