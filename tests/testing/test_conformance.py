"""The suite finds each fault that a method can have, and says which contract it breaks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import lorank
from lorank.allocators import BudgetLike, final_budget, plan_to_keep
from lorank.testing import AllocatorConformance


@dataclass(frozen=True)
class Sound(lorank.Allocator):
    """Prunes in one cut, and keeps every contract; the others break one each."""

    budget: BudgetLike = None

    def resolve_budget(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> lorank.ResolvedBudget | None:
        return final_budget(self.budget, layers, run)

    def due(self, step: int, run: lorank.TrainingInfo) -> bool:
        return step == 3

    def scores(self, context: lorank.Context) -> Mapping[str, Tensor]:
        return {name: layer.A.detach().norm(dim=1) for name, layer in context.layers.items()}

    def allocate(self, context: lorank.Context, state: dict[str, Tensor]) -> lorank.Allocation | None:
        scores = self.scores(context)
        budget = self.resolve_budget(context.layers, context.run)
        assert budget is not None
        return lorank.Allocation(plan_to_keep(budget.keep_best(scores), context.layers.ranks), scores)


def suite(kind: Callable[..., lorank.Allocator]) -> AllocatorConformance:
    class Suite(AllocatorConformance):
        def make(self, budget: Any = None) -> lorank.Allocator:
            return kind(budget=budget)

    return Suite()


def test_a_suite_without_a_method_fails() -> None:
    class TestNothing(AllocatorConformance):
        pass

    assert not inspect.isabstract(TestNothing)  # pytest would pass over it in silence
    with pytest.raises(NotImplementedError, match=r"TestNothing must define make\(self, budget=None\)"):
        TestNothing().test_settings_are_a_frozen_dataclass_with_a_json_description()


@dataclass
class Thawed(lorank.Allocator):
    budget: BudgetLike = None

    def allocate(self, context: lorank.Context, state: dict[str, Tensor]) -> lorank.Allocation | None:
        return None


class Inherits(Sound):
    strength: float = 1.0  # no field of a dataclass


@dataclass(frozen=True)
class Unequal(Sound):
    thing: object = field(default_factory=object)


@dataclass(frozen=True)
class Unwritten(Sound):
    modules: frozenset[str] = frozenset({"q_proj"})


@dataclass(frozen=True)
class Silent(Sound):
    def describe(self) -> dict[str, Any]:
        return {"method": "Silent"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Thawed, "Thawed must be a frozen dataclass"),
        (Inherits, "Inherits must be a frozen dataclass"),
        (Unequal, "two allocators with the same settings must be equal"),
        (Unwritten, r"describe\(\) must be JSON"),
        (Silent, r"describe\(\) must have 'method' and every setting"),
    ],
)
def test_settings(kind: type[lorank.Allocator], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        suite(kind).test_settings_are_a_frozen_dataclass_with_a_json_description()


@dataclass(frozen=True)
class Counts(Sound):
    seen: ClassVar[list[int]] = []

    def due(self, step: int, run: lorank.TrainingInfo) -> bool:
        self.seen.append(step)
        return len(self.seen) == 3


def test_due() -> None:
    with pytest.raises(AssertionError, match="must depend on its arguments and the settings alone"):
        suite(Counts).test_due_is_a_pure_function_of_the_step()


@dataclass(frozen=True)
class Greedy(Sound):
    def resolve_budget(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> lorank.ResolvedBudget | None:
        return lorank.Budget(ranks=layers.total_rank).resolve(layers)


@dataclass(frozen=True)
class Stingy(Sound):
    def allocate(self, context: lorank.Context, state: dict[str, Tensor]) -> lorank.Allocation | None:
        ranks = context.layers.ranks
        return lorank.Allocation({name: lorank.LayerPlan((0,) if i == 0 else ()) for i, name in enumerate(ranks)})


@dataclass(frozen=True)
class Unbounded(Sound):
    def resolve_budget(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> lorank.ResolvedBudget | None:
        return None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Greedy, "the run must end within the budget '30 ranks'"),
        (Stingy, "the run must use at least a third of its budget '30 ranks'"),
        (Unbounded, "whose resolve_budget returns a budget"),
    ],
)
def test_budget(kind: type[lorank.Allocator], message: str) -> None:
    tests = suite(kind)
    with pytest.raises(AssertionError, match=message):
        tests.test_the_run_ends_at_or_under_its_budget(tests.models["causal"], "30 ranks")


@dataclass(frozen=True)
class Dice(Sound):
    def scores(self, context: lorank.Context) -> Mapping[str, Tensor]:
        return {name: torch.rand(rank) for name, rank in context.layers.ranks.items()}


def test_chance() -> None:
    with pytest.raises(AssertionError, match="two runs with one seed must be bitwise equal"):
        suite(Dice).test_two_runs_with_one_seed_are_equal()


@dataclass(frozen=True)
class WritesWeights(Sound):
    def allocate(self, context: lorank.Context, state: dict[str, Tensor]) -> lorank.Allocation | None:
        with torch.no_grad():
            next(iter(context.layers.values())).B.mul_(2)
        return None


@dataclass(frozen=True)
class LeavesEvaluation(Sound):
    def before_step(self, context: lorank.Context, state: dict[str, Tensor]) -> None:
        context.model.eval()


@dataclass(frozen=True)
class DrawsWithNumPy(Sound):
    def start(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> dict[str, Tensor]:
        np.random.rand()  # noqa: NPY002  # the fault
        return {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WritesWeights, "allocate changed the model: base_model.model.model.layers.0.self_attn.q_proj.lora_B"),
        (LeavesEvaluation, r"before_step changed the model: model \(training\)"),
        (Dice, "allocate used or changed the global random state of PyTorch"),
        (DrawsWithNumPy, "start used or changed the global random state of NumPy"),
    ],
)
def test_what_hooks_must_not_touch(kind: type[lorank.Allocator], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        suite(kind).test_hooks_leave_weights_and_random_state_unchanged()


@dataclass(frozen=True)
class Nested(Sound):
    def start(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> dict[str, Tensor]:
        return {"scores": dict(self.scores_of(layers))}  # type: ignore[dict-item]  # the fault

    def scores_of(self, layers: lorank.AdapterLayers) -> Mapping[str, Tensor]:
        return {name: torch.zeros(layer.rank) for name, layer in layers.items()}


@dataclass(frozen=True)
class KeepsGraph(Sound):
    def before_step(self, context: lorank.Context, state: dict[str, Tensor]) -> None:
        state["norm"] = next(iter(context.layers.values())).A.norm()


@dataclass(frozen=True)
class Remembers(Sound):
    """Scores by the gradients that it has seen, which it keeps beside the state."""

    sees_gradients: ClassVar[bool] = True

    def start(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> dict[str, Tensor]:
        object.__setattr__(self, "memory", {name: torch.zeros(layer.rank) for name, layer in layers.items()})
        return {}

    def before_step(self, context: lorank.Context, state: dict[str, Tensor]) -> None:
        if context.step < 3:
            return
        for name, layer in context.layers.items():
            if layer.B.grad is not None and len(self.memory[name]) == layer.rank:  # type: ignore[attr-defined]
                self.memory[name] += layer.B.grad.norm(dim=0)  # type: ignore[attr-defined]

    def due(self, step: int, run: lorank.TrainingInfo) -> bool:
        return step == run.total_steps - 1

    def scores(self, context: lorank.Context) -> Mapping[str, Tensor]:
        return self.memory  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Nested, "after step 0, 'scores' is a dict"),
        (KeepsGraph, "after step 1, 'norm' requires a gradient"),
        (Remembers, "the allocator itself must not change while it runs"),
    ],
)
def test_state(kind: type[lorank.Allocator], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        suite(kind).test_the_state_is_a_flat_dictionary_of_tensors()


def test_memory_that_is_not_saved(tmp_path: Path) -> None:
    tests = suite(Remembers)
    with pytest.raises(AssertionError, match="must be bitwise equal to the uninterrupted run"):
        tests.test_a_resumed_run_equals_the_uninterrupted_run(tests.models["causal"], tmp_path)


def test_memory_that_the_trainer_does_not_save(tmp_path: Path) -> None:
    tests = suite(Remembers)
    with pytest.raises(AssertionError, match="must end like the uninterrupted run"):
        tests.test_the_trainer_trains_saves_and_resumes_exactly(tests.models["causal"], tmp_path)


@dataclass(frozen=True)
class Idle(Sound):
    def due(self, step: int, run: lorank.TrainingInfo) -> bool:
        return False

    def resolve_budget(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> lorank.ResolvedBudget | None:
        return None


@dataclass(frozen=True)
class Verbose(Sound):
    def allocate(self, context: lorank.Context, state: dict[str, Tensor]) -> lorank.Allocation | None:
        return lorank.Allocation({}, details={"loss": torch.zeros(())})


@dataclass(frozen=True)
class OneScore(Sound):
    def allocate(self, context: lorank.Context, state: dict[str, Tensor]) -> lorank.Allocation | None:
        return lorank.Allocation({}, {name: torch.zeros(1) for name in context.layers})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Idle, "in a run of 12 steps no rank was allocated"),
        (Verbose, "Allocation.details must be JSON"),
        (OneScore, "with one score per rank before the change"),
    ],
)
def test_history(kind: type[lorank.Allocator], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        suite(kind).test_the_history_is_json()


@dataclass(frozen=True)
class Doubles(Sound):
    """Its gates are doubled whenever ranks move."""

    def start(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> dict[str, Tensor]:
        layers.learn_gates()
        return {}

    def after_resize(self, context: lorank.Context, state: dict[str, Tensor], origins: Tensor) -> None:
        assert context.layers.gates is not None
        context.layers.gates.values.mul_(2)


def test_gates_that_change_with_a_resize() -> None:
    tests = suite(Doubles)
    with pytest.raises(AssertionError, match="must not change the model's output"):
        tests.test_adding_and_removing_ranks_leaves_the_output_unchanged()


@dataclass(frozen=True)
class Hooked(Sound):
    """Changes what a layer gives in a way that no file knows of."""

    def start(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> dict[str, Tensor]:
        first = next(iter(layers.values())).module
        first.register_forward_hook(lambda module, inputs, output: output * 1.1)
        return {}


def test_outputs_that_no_file_knows_of(tmp_path: Path) -> None:
    tests = suite(Hooked)
    with pytest.raises(AssertionError, match="loaded by PEFT alone, must give the outputs of the live model"):
        tests.test_an_adapter_saved_at_any_step_loads_in_plain_peft(tests.models["causal"], tmp_path)


@pytest.mark.parametrize("form", ["test_with_dora", "test_with_rank_stabilised_scaling"])
def test_outputs_that_no_file_knows_of_in_other_forms(form: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="must give the outputs of the live model"):
        getattr(suite(Hooked), form)(tmp_path)
