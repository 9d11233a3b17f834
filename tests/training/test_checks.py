"""What cannot run is refused before the start, with what to do about it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorank
from lorank.errors import AllocatorError, LorankError, OptimizerStateError, ScheduleError, ValidationBatchError
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import QUICK, adamw


def test_no_steps() -> None:
    model = adapted(tiny_llama())
    with pytest.raises(ScheduleError, match="total_steps=0"):
        lorank.attach(model, adamw(model), lorank.StaticLoRA(), total_steps=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("alora", r"the method is 'alora', expected an allocator: give lorank\.ALoRA\(\), with its settings"),
        ("lora", r"the method is 'lora', .* give one of lorank\.StaticLoRA\(\), lorank\.ALoRA\(\), "),
        (lorank.SoRA, r"the method is the class SoRA, .* make it with its settings: SoRA\(\)"),
        (None, r"the method is a NoneType, .* give one of"),
    ],
)
def test_something_else_than_a_method(given: object, message: str) -> None:
    model = adapted(tiny_llama())
    with pytest.raises(AllocatorError, match=f"attach: {message}"):
        lorank.attach(model, adamw(model), given, total_steps=10)
    with pytest.raises(TypeError, match=f"RankCallback: {message}"):
        lorank.RankCallback(given)


def test_an_optimiser_of_something_else() -> None:
    model, other = adapted(tiny_llama()), adapted(tiny_llama())
    with pytest.raises(OptimizerStateError, match="does not hold the LoRA parameters"):
        lorank.attach(model, adamw(other), QUICK, validation_batch=token_batch(), total_steps=10)


def test_an_optimiser_state_of_other_ranks_is_refused_when_it_is_loaded() -> None:
    model, other = adapted(tiny_llama()), adapted(tiny_llama(), r=6)
    optimizer, foreign = adamw(model), adamw(other)
    other(**token_batch()).loss.backward()
    foreign.step()
    lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
    with pytest.raises(OptimizerStateError, match=r"'exp_avg' of .*q_proj.lora_A has shape \(6, 32\)"):
        optimizer.load_state_dict(foreign.state_dict())


def test_a_method_that_scores_without_a_batch() -> None:
    model = adapted(tiny_llama())
    with pytest.raises(ValidationBatchError, match=r"ALoRA scores ranks on a fixed batch .* none was given"):
        lorank.attach(model, adamw(model), QUICK, total_steps=10)


def test_a_batch_that_cannot_be_scored_on_is_found_before_training() -> None:
    model = adapted(tiny_llama())
    batch = token_batch()
    for broken, message in (
        ({"input_ids": batch["input_ids"]}, "labels"),
        ({**batch, "labels": torch.full_like(batch["labels"], -100)}, "all 40 labels"),
        ({**batch, "labels": batch["labels"][:0]}, "no sample"),
    ):
        with pytest.raises(ValidationBatchError, match=message):
            lorank.attach(model, adamw(model), QUICK, validation_batch=broken, total_steps=10)


def test_a_loss_that_is_not_finite() -> None:
    model = adapted(tiny_llama())
    list(lorank.find_layers(model).values())[-1].B.data.fill_(float("nan"))  # some kernels of attention swallow one
    with pytest.raises(ValidationBatchError, match="the loss of the model on the validation batch is nan"):
        lorank.attach(model, adamw(model), QUICK, validation_batch=token_batch(), total_steps=10)


def test_reserved_ranks_without_deepspeed() -> None:
    model = lorank.reserve_(adapted(tiny_llama()), 8)
    with pytest.raises(LorankError, match="leave out reserve_"):
        lorank.attach(model, adamw(model), lorank.SoRA(), total_steps=10)


def test_a_sharded_adapter() -> None:
    model = adapted(tiny_llama())
    name, layer = next(iter(lorank.find_layers(model).items()))
    optimizer = adamw(model)
    layer.B.placements = ()  # as a DTensor has
    with pytest.raises(LorankError, match=rf"the LoRA weights of {name} are sharded over processes \(DTensor\)"):
        lorank.attach(model, optimizer, lorank.StaticLoRA(), total_steps=10)


def test_fsdp1() -> None:
    class FullyShardedDataParallel(nn.Module):
        """A stand-in: the real one needs a process group."""

    model = adapted(tiny_llama())
    model.wrapped = FullyShardedDataParallel()
    with pytest.raises(LorankError, match=r"wrapped in FullyShardedDataParallel \(FSDP1\).*shard_base_"):
        lorank.attach(model, adamw(model), lorank.StaticLoRA(), total_steps=10)


def test_an_optimiser_that_shards_its_state() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    optimizer.__class__ = type("ZeroRedundancyOptimizer", (type(optimizer),), {})
    with pytest.raises(LorankError, match="use the optimiser without ZeroRedundancyOptimizer"):
        lorank.attach(model, optimizer, lorank.StaticLoRA(), total_steps=10)


def test_a_method_that_needs_no_batch_does_not_look_at_one() -> None:
    model = adapted(tiny_llama())
    ranks = lorank.attach(model, adamw(model), lorank.SoRA(), validation_batch={"nothing": 1}, total_steps=10)
    assert ranks.step == 0
