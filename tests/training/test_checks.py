"""What cannot run is refused before the start, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank.errors import (
    AdapterError,
    AllocatorError,
    LorankError,
    OptimizerStateError,
    ScheduleError,
    ValidationBatchError,
)
from lorank.lora import fold_gates_
from tests.methods import METHODS
from tests.models import adapted, tiny_llama, token_batch
from tests.scoring.families import Tuples
from tests.scoring.test_preserve_state import state
from tests.training.loops import QUICK, adamw


def test_no_steps() -> None:
    model = adapted(tiny_llama())
    with pytest.raises(ScheduleError, match="total_steps=0"):
        lorank.attach(model, adamw(model), lorank.StaticLoRA(), total_steps=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("alora", r"the method is 'alora', expected an allocator: give lorank\.ALoRA\(\), with its settings"),
        ("lora", r"the method is 'lora', .* give one of lorank\.StaticLoRA\(\), lorank\.BalancedLoRA\(\), "),
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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for step in range(steps):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


ROUNDS = {"k1": 2, "k2": 2, "rounds": 2, "unit": "steps", "per_round": 2}
NEEDS_A_GRADIENT = [
    lorank.ALoRA(**ROUNDS),
    lorank.ALoRA(scores="screen", **ROUNDS),
    lorank.ALoRADNAS(search_rows=2, **ROUNDS),
]


def detached(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        loss: Tensor = model(**batch).loss
    return loss


@pytest.mark.parametrize("method", NEEDS_A_GRADIENT, ids=["first_order", "screen", "dnas"])
def test_a_loss_function_without_a_graph_is_found_before_training(method: lorank.Allocator) -> None:
    model = adapted(tiny_llama(), r=2)
    with pytest.raises(ValidationBatchError, match=r"loss_fn returns .* has no gradient; .*without torch.no_grad"):
        lorank.attach(model, adamw(model), method, validation_batch=token_batch(), loss_fn=detached, total_steps=10)


def test_exact_scores_need_no_graph() -> None:
    model = adapted(tiny_llama(), r=2, target_modules=["q_proj"])
    method = lorank.ALoRA(scores="exact", **ROUNDS)
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, method, validation_batch=token_batch(), loss_fn=detached, total_steps=10)
    train(model, optimizer, 2)
    assert len(ranks.history) == 2


def test_rows_that_cannot_be_taken_in_turn_are_found_before_training() -> None:
    model = adapted(tiny_llama(), r=2)
    batch = {**token_batch(), "position_ids": torch.arange(10).unsqueeze(0)}  # one row for all samples
    with pytest.raises(ValidationBatchError, match=r"have \[1, 4\] rows: expected the same number"):
        lorank.attach(model, adamw(model), NEEDS_A_GRADIENT[2], validation_batch=batch, total_steps=10)


def test_a_batch_that_ard_lora_cannot_read_is_found_before_training() -> None:
    model = adapted(tiny_llama(), r=2)
    with pytest.raises(ValidationBatchError, match="the model returned no loss"):
        lorank.attach(
            model,
            adamw(model),
            lorank.ARDLoRA(heads="module"),
            validation_batch={"input_ids": token_batch()["input_ids"]},
            total_steps=10,
        )


def test_an_error_of_the_model_itself_says_where_it_came_from() -> None:
    model = adapted(tiny_llama(), r=2)
    batch = {**token_batch(), "input_ids": torch.full((4, 10), 10_000)}  # beyond the vocabulary
    with pytest.raises(ValidationBatchError, match=r"the model raised IndexError on a validation batch with input_ids"):
        lorank.attach(model, adamw(model), QUICK, validation_batch=batch, total_steps=10)


def test_a_model_that_returns_tuples_moves_the_same_ranks() -> None:
    """The check at the start passed, and the first round failed."""
    method = lorank.ALoRA(**ROUNDS)
    batches = [{key: value for key, value in token_batch(seed=n).items() if key != "attention_mask"} for n in range(6)]
    histories = []
    for make in (tiny_llama, lambda: Tuples(tiny_llama())):
        model = adapted(make(), r=2, target_modules=["q_proj", "v_proj", "up_proj"])
        optimizer = adamw(model)
        ranks = lorank.attach(model, optimizer, method, validation_batch=batches[5], total_steps=10)
        for batch in batches[:5]:
            output = model(**batch)
            (output[0] if isinstance(output, tuple) else output.loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        histories.append([(list(record.ranks.values()), record.details.get("loss")) for record in ranks.history])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 3
    assert histories[0][0] != histories[0][1]


@pytest.mark.parametrize("method", NEEDS_A_GRADIENT, ids=["first_order", "screen", "dnas"])
def test_trying_leaves_no_trace(method: lorank.Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is bitwise the same, whether or not its scores were tried at the start."""
    seen = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr("lorank.training.run_start.try_scoring", lambda run: None)
        model = adapted(tiny_llama(), r=2, lora_dropout=0.1)
        optimizer = adamw(model)
        model(**token_batch(seed=9)).loss.backward()  # gradients that exist before attach
        torch.manual_seed(5)
        ranks = lorank.attach(model, optimizer, method, validation_batch=token_batch(), total_steps=10)
        before = state(model, ranks.layers)
        gates = None if ranks.layers.gates is None else ranks.layers.gates.values.clone()
        train(model, optimizer, 5)
        found = {**before, "gates": None}  # identities of tensors differ between two runs
        found["gradients"] = None
        found["forward"] = None
        seen.append((found, gates, [p.detach().clone() for p in model.parameters()]))
    assert seen[0][0] == seen[1][0]
    torch.testing.assert_close(seen[0][1:], seen[1][1:], rtol=0, atol=0)


def test_a_scorer_of_ones_own_is_tried_too() -> None:
    @dataclass(frozen=True)
    class Broken(lorank.Scorer):
        needs_validation_batch: ClassVar[bool] = True

        def score(self, context: lorank.Context, state: dict[str, Tensor], choose: object) -> lorank.Scores:
            state["seen"] = torch.ones(1)
            raise ValidationBatchError("this scorer reads the field 'weights': add it to the batch")

    class Rounds(lorank.RoundAllocator):
        @property
        def scorer(self) -> lorank.Scorer:
            return Broken()

    model = adapted(tiny_llama(), r=2)
    with pytest.raises(ValidationBatchError, match="add it to the batch"):
        lorank.attach(model, adamw(model), Rounds(**ROUNDS), validation_batch=token_batch(), total_steps=10)


@pytest.mark.parametrize("name", ["ALoRASensi", "AdaLoRA", "SoRA", "ARDLoRA"])
def test_the_methods_that_the_message_names_need_no_batch(name: str) -> None:
    model = adapted(tiny_llama(), r=2)
    with pytest.raises(ValidationBatchError, match=name):
        lorank.attach(model, adamw(model), QUICK, total_steps=20)
    optimizer = adamw(model)
    settings = {"ALoRASensi": ROUNDS, "ARDLoRA": {"alpha_lr": 0.05, "resize_every": 2, "heads": "module"}}.get(name, {})
    ranks = lorank.attach(model, optimizer, getattr(lorank, name)(**settings), total_steps=20)
    train(model, optimizer, 20)
    assert len(ranks.history) > 1


@pytest.mark.parametrize("name", ["adalora", "sora", "alora-dnas", "ard"])
def test_gates_that_somebody_folds_stop_the_next_step(name: str) -> None:
    method = METHODS[name]
    model = adapted(tiny_llama(), random_B=False, **method.lora)
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, method.make(), validation_batch=token_batch(seed=9), total_steps=20)

    def step(seed: int) -> None:
        optimizer.zero_grad()
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()

    for seed in range(3):
        step(seed)
    fold_gates_(ranks.layers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"the gate of .* was removed or replaced during the run"):
        step(3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
