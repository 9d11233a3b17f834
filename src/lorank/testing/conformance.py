"""The contract of every method, as a class of tests that pytest runs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lorank.allocators import Allocation, Allocator, Budget, TrainingInfo
from lorank.errors import AdapterError
from lorank.lora import LayerPlan, find_layers, make_peft_model, plan_for_heads
from lorank.testing.hooks import around_hooks, random_state_unchanged, weights_unchanged, with_other_random_state
from lorank.testing.plain_peft import plain_peft
from lorank.testing.tiny_models import TINY_LLAMA, TinyModel
from lorank.training import HistoryError, RankCallback, Ranks, Record, attach

PROBE, VALIDATION = 50, 99
"""Numbers of two batches that are not used for training: one to compare outputs, one to score ranks."""


class Loop:
    """A training loop as a user writes it.

    Args:
        model: the model and its batches.
        allocator: the method.
        steps: optimiser steps of the whole run. ≥ 1.
        lora: settings of the ``LoraConfig``; default: rank 4 in all linear layers.
    """

    def __init__(self, model: TinyModel, allocator: Allocator, *, steps: int, **lora: Any) -> None:
        self.kind = model
        self.steps = steps
        self.model = with_adapter(model, **lora)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.ranks: Ranks = attach(
            self.model,
            self.optimizer,
            allocator,
            validation_batch=model.batch(VALIDATION),
            train_batches=lambda: [model.batch(number) for number in range(2)],
            total_steps=steps,
            seed=7,
        )
        self.losses: list[float] = []

    def run(self, until: int | None = None) -> Loop:
        """Trains until ``until`` steps are done; None: to the end. Returns the loop itself."""
        while self.ranks.step < (self.steps if until is None else until):
            torch.manual_seed(self.ranks.step)  # for dropout
            loss = self.model(**self.kind.batch(self.ranks.step)).loss
            loss.backward()
            self.losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def logits(self) -> Tensor:
        """The model's logits for the probe batch, which is not used for training, in evaluation mode."""
        return probe_logits(self.model, self.kind)


class AllocatorConformance:
    """The contract of :class:`lorank.Allocator` as tests. Derive a class whose name begins with ``Test``.

        class TestMagnitudePruning(lorank.testing.AllocatorConformance):
            def make(self, budget=None):
                return MagnitudePruning(budget=budget)

    Attributes:
        models: the models to train, by name. All tests use the first model. The tests that depend on the architecture
            also use the others.
        budgets: the budgets to test, by name. Empty for a method that takes no budget.
        steps: optimiser steps of a run. ≥ 4, and even.
        lora: settings of the ``LoraConfig``; default: rank 4 in all linear layers.
    """

    models: Mapping[str, TinyModel] = {"causal": TINY_LLAMA}
    budgets: Mapping[str, Any] = {
        "ranks per module": 2,
        "ranks": "31 ranks",
        "parameters": "1900 params",
        "bytes": {"bytes": 7000},
        "server": {"ranks_per_module": 3, "max_lora_rank": 4},
    }
    steps: ClassVar[int] = 12
    lora: Mapping[str, Any] = {}

    def make(self, budget: Any = None) -> Allocator:
        """The method, with settings that use all its features in a run of ``steps`` steps.

        Args:
            budget: a budget as a user writes it, see :class:`lorank.Budget`; None: the method's default.

        Raises:
            NotImplementedError: the derived class does not define this method.
        """
        # Not an abstract method: pytest skips abstract classes without a message, so nothing would be tested.
        raise NotImplementedError(
            f"{type(self).__name__} must define make(self, budget=None) and return the method to be tested"
        )

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Called by pytest: selects the models and budgets for each test."""
        first, *others = self.models
        if "budget" in metafunc.fixturenames:
            names = list(self.budgets)
            # Each other model gets one budget, in turn. Without budgets zip gives no cases.
            cases = [*((first, name) for name in names), *zip(others, itertools.cycle(names[::-2]), strict=False)]
            values = [(self.models[kind], self.budgets[name]) for kind, name in cases]
            metafunc.parametrize(("model", "budget"), values, ids=[f"{kind}-{name}" for kind, name in cases])
        elif "model" in metafunc.fixturenames:
            metafunc.parametrize("model", self.models.values(), ids=list(self.models))

    # The method by itself.

    def test_settings_are_a_frozen_dataclass_with_a_json_description(self) -> None:
        allocator = self.make()
        method = type(allocator)
        # A class with annotations needs dataclass parameters of its own: inherited parameters do not cover its fields.
        own = "__annotations__" in vars(method)
        parameters = vars(method).get("__dataclass_params__") if own else getattr(method, "__dataclass_params__", None)
        _require(
            dataclasses.is_dataclass(allocator) and parameters is not None and parameters.frozen,
            f"{type(allocator).__name__} must be a frozen dataclass whose fields are its settings, because a recipe "
            "sets them and a resumed run compares them. Decorate the class with @dataclass(frozen=True)",
        )
        _require(
            allocator == self.make() == copy.deepcopy(allocator),
            "two allocators with the same settings must be equal. Do not store a value without a usable == in a field, "
            "such as a tensor or a new function",
        )
        try:
            written = json.loads(json.dumps(allocator.describe()))
        except (TypeError, ValueError) as error:
            raise AssertionError(
                f"describe() must be JSON, because it is saved with a run: {error}. Use settings of plain types, or "
                "override describe()"
            ) from error
        _require(
            set(written) >= {"method", *(field.name for field in dataclasses.fields(allocator))},  # type: ignore[arg-type]  # checked above
            "describe() must have 'method' and every setting, because they are compared when a run is resumed, and "
            f"other settings are refused. It has {', '.join(written)}",
        )

    def test_due_is_a_pure_function_of_the_step(self) -> None:
        layers = find_layers(with_adapter(self._first, **self.lora))
        run = TrainingInfo(self.steps, seed=7, initial_ranks=layers.ranks)
        one, other = self.make(), self.make()
        forwards = [bool(one.due(step, run)) for step in range(1, self.steps + 1)]
        backwards = [bool(other.due(step, run)) for step in range(self.steps, 0, -1)]
        again = [bool(one.due(step, run)) for step in range(1, self.steps + 1)]
        _require(
            forwards == backwards[::-1] == again,
            "due(step, run) must depend on its arguments and the settings alone: it is called in any order, more than "
            "once, and in processes that have run no earlier step. Compute it from step and run.total_steps, without a "
            "count",
            f"due in steps 1 to {self.steps}: {forwards}; called from the last step backwards: {backwards[::-1]}; "
            f"called again: {again}",
        )

    # One run.

    def test_the_run_ends_at_or_under_its_budget(self, model: TinyModel, budget: Any) -> None:
        loop = Loop(model, self.make(budget), steps=self.steps, **self.lora)
        resolved = loop.ranks.budget
        if resolved is None:
            raise AssertionError(
                f"make(budget={budget!r}) must return a method whose resolve_budget returns a budget, for example "
                "lorank.allocators.resolve_budget(self.budget, layers, run). For a method without a budget, set "
                "budgets = {}"
            )
        per_head = any(layer.groups is not None for layer in loop.ranks.layers.values())
        loop.run()
        # The cost of a head's rank is its trained parameters, which the finished adapter does not have any more.
        resolved = resolved if per_head else Budget.parse(budget).resolve(loop.ranks.layers)
        ranks = loop.ranks.layers.ranks
        _require(
            resolved.fits(ranks),
            f"the run must end within the budget {budget!r}. In the last plan, keep the ranks that "
            "ResolvedBudget.keep_best returns, or add ranks only while ResolvedBudget.room is above 0",
            f"used: {resolved.used(ranks)}, ranks: {ranks}",
        )
        _require(
            not resolved.fits({name: 3 * rank for name, rank in ranks.items()}),
            f"the run must use at least a third of its budget {budget!r}. Do not prune further than the budget that "
            "resolve_budget returns",
            f"used: {resolved.used(ranks)}, ranks: {ranks}",
        )
        _require(loop.ranks.layers.gates is None, "after finish no gate may remain. Do not create gates in finish")
        broken = [name for name, p in loop.model.named_parameters() if not torch.isfinite(p).all()]
        _require(not broken, "weights must stay finite", f"NaN or infinite: {broken}")

    def test_two_runs_with_one_seed_are_equal(self) -> None:
        first = Loop(self._first, self.make(), steps=self.steps, **self.lora).run()
        with around_hooks(type(self.make()), with_other_random_state):
            second = Loop(self._first, self.make(), steps=self.steps, **self.lora).run()
        why = (
            "two runs with one seed must be bitwise equal, for any global random state. Draw random numbers from "
            "torch.Generator().manual_seed(run.seed * 1_000_003 + step), and keep everything that changes in the state"
        )
        _require(first.losses == second.losses, why, f"losses: {first.losses} and {second.losses}")
        moved = [[record.ranks for record in loop.ranks.history] for loop in (first, second)]
        _require(moved[0] == moved[1], why, f"ranks: {moved[0]} and {moved[1]}")
        _require_same(first.model.state_dict(), second.model.state_dict(), why)

    def test_hooks_leave_weights_and_random_state_unchanged(self) -> None:
        kind = type(self.make())
        with around_hooks(kind, weights_unchanged), around_hooks(kind, random_state_unchanged):
            Loop(self._first, self.make(), steps=self.steps, **self.lora).run()

    def test_the_state_is_a_flat_dictionary_of_tensors(self) -> None:
        allocator = self.make()
        before = dict(vars(allocator)) if hasattr(allocator, "__dict__") else {}
        loop = Loop(self._first, allocator, steps=self.steps, **self.lora)
        for step in range(self.steps):
            _check_state(loop.ranks.state, step)
            loop.run(step + 1)
        _check_state(loop.ranks.state, self.steps)
        after = dict(vars(allocator)) if hasattr(allocator, "__dict__") else {}
        _require(
            before == after,
            "the allocator itself must not change while it runs: it is not saved, so a resumed run would differ. Store "
            "values as tensors in the state, which start returns and every hook receives",
            f"attributes before: {before}, and after: {after}",
        )

    def test_the_history_is_json(self) -> None:
        loop = Loop(self._first, self.make(), steps=self.steps, **self.lora).run()
        _require(
            bool(loop.ranks.history.allocations) or not loop.ranks.allocator.moves_ranks,
            f"in a run of {self.steps} steps no rank was allocated, so the tests would check nothing. Let make return "
            "settings with which the method allocates ranks, or raise steps. For a method that never moves ranks, set "
            "moves_ranks = False",
        )
        for record in loop.ranks.history:
            try:
                Record.from_json(record.to_json())
            except (TypeError, ValueError, HistoryError) as error:
                raise AssertionError(
                    "Allocation.details must be JSON: plain numbers, strings, lists and dictionaries with string keys. "
                    f"Step {record.step}: {error}"
                ) from error
        for earlier, record in itertools.pairwise(loop.ranks.history):
            for name, scores in record.scores.items():
                _require(
                    len(scores) == earlier.ranks.get(name),
                    "Allocation.scores must have, for each layer by its full name, a tensor of shape (r,) with one "
                    "score per rank before the change",
                    f"step {record.step}: {len(scores)} scores for {earlier.ranks.get(name)} ranks of {name}",
                )

    # Saved runs and adapters.

    def test_a_resumed_run_equals_the_uninterrupted_run(self, model: TinyModel, tmp_path: Path) -> None:
        """A run resumed from files in a new model, with the weights or the optimiser loaded first, is bitwise equal."""
        half = self.steps // 2 + 1
        whole = Loop(model, self.make(), steps=self.steps, **self.lora).run(half)
        torch.save(whole.model.state_dict(), tmp_path / "model.pt")
        torch.save(whole.optimizer.state_dict(), tmp_path / "optimizer.pt")
        whole.run()
        for order in (("model", "optimizer"), ("optimizer", "model")):
            resumed = Loop(model, self.make(), steps=self.steps, **self.lora)
            for part in order:
                getattr(resumed, part).load_state_dict(torch.load(tmp_path / f"{part}.pt", weights_only=True))
            _require(resumed.ranks.step == half, f"the run must go on at step {half}", f"step {resumed.ranks.step}")
            resumed.run()
            why = (
                f"a run that is saved after step {half} and resumed in a new process must be bitwise equal to the "
                "uninterrupted run. Check for values stored outside the state, for a start that returns other names "
                "than the run uses later, and for random numbers from a generator that is not seeded by run and step"
            )
            _require(resumed.losses == whole.losses[half:], why, f"losses: {resumed.losses}, {whole.losses[half:]}")
            _require_same(resumed.model.state_dict(), whole.model.state_dict(), why)
            ends = [loop.ranks.history[-1].ranks for loop in (resumed, whole)]
            _require(ends[0] == ends[1], why, f"ranks: {ends[0]} and {ends[1]}")

    def test_adding_and_removing_ranks_leaves_the_output_unchanged(self) -> None:
        loop = Loop(self._first, self.make(), steps=self.steps, **self.lora).run(self.steps // 2)
        ranks = loop.ranks
        layers = ranks.layers
        before = loop.logits()
        old, heads = layers.ranks, {name: layer.head_ranks for name, layer in layers.items()}
        room = []
        for name, layer in layers.items():
            groups = layer.groups
            full = groups is not None and layer.head_ranks[0] >= groups.capacity(layer.d_in, layer.d_out)
            if layer.rank < layer.max_rank and not full:
                room.append(name)

        def plan(name: str, new: int) -> LayerPlan:
            if layers[name].groups is not None:
                return plan_for_heads(layers[name].head_ranks, [heads[name][0] + new, *heads[name][1:]])
            return LayerPlan(tuple(range(old[name])), new)

        why = (
            "a new rank has B = 0, so it must not change the model's output, and its removal must not change it. In "
            "after_resize, reindex every tensor of the state with one entry per rank (lorank.reindex_ranks with "
            "origins), and do not change the gates of the ranks that are kept"
        )
        for new in (1, 0):
            ranks._carry_out(Allocation({name: plan(name, new) for name in room}), ranks._context(), 0.0)
            _require_close(loop.logits(), before, 1e-5, why)
        _require(layers.ranks == old, "the ranks must be the same as before", f"{layers.ranks}, before {old}")
        loop.run()
        broken = [name for name, p in loop.model.named_parameters() if not torch.isfinite(p).all()]
        _require(
            not broken,
            "weights must stay finite after ranks were added and removed",
            f"NaN or infinite: {broken}",
        )

    def test_an_adapter_saved_at_any_step_loads_in_plain_peft(self, model: TinyModel, tmp_path: Path) -> None:
        """In the middle and at the end of training; PEFT loads it in a process that never imports lorank."""
        loop = Loop(model, self.make(), steps=self.steps, **self.lora)
        for step in (self.steps // 2, self.steps):
            _require_plain(loop.run(step), tmp_path / str(step))

    def test_the_trainer_trains_saves_and_resumes_exactly(self, model: TinyModel, tmp_path: Path) -> None:
        half = self.steps // 2
        rows = [model.batch(number) for number in range(half)]

        def trainer(folder: str) -> tuple[Trainer, RankCallback]:
            callback = RankCallback(self.make(), validation_batch=model.batch(VALIDATION))
            arguments = TrainingArguments(
                output_dir=str(tmp_path / folder),
                max_steps=self.steps,
                per_device_train_batch_size=1,
                learning_rate=1e-2,
                save_strategy="steps",
                save_steps=half,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
                logging_steps=1,
                seed=3,
            )
            torch.manual_seed(0)
            peft_model = with_adapter(model, **{"lora_dropout": 0.1, **self.lora})
            return (
                Trainer(
                    peft_model,
                    arguments,
                    train_dataset=rows,
                    data_collator=lambda batches: batches[0],
                    callbacks=[callback],
                ),
                callback,
            )

        whole, callback = trainer("run")
        whole.train()
        resumed, again = trainer("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{half}"))
        assert callback.ranks is not None
        assert again.ranks is not None
        why = f"the Trainer, resumed from its checkpoint of step {half}, must end like the uninterrupted run"
        assert whole.model is not None
        assert resumed.model is not None
        _require_same(resumed.model.state_dict(), whole.model.state_dict(), why)
        ends = [again.ranks.layers.ranks, callback.ranks.layers.ranks]
        _require(ends[0] == ends[1], why, f"ranks: {ends[0]} and {ends[1]}")
        checkpoint = tmp_path / "run" / f"checkpoint-{self.steps}"
        _require_plain_folder(checkpoint, model, probe_logits(whole.model, model), tmp_path)

    # Other forms of LoRA.

    def test_with_dora(self, tmp_path: Path) -> None:
        lora = {**self.lora, "use_dora": True}
        if self.make().heads_of(find_layers(with_adapter(self._first, **self.lora))):
            try:
                Loop(self._first, self.make(), steps=self.steps, **lora)
            except AdapterError:
                return
            raise AssertionError(
                "DoRA has no form per attention head, so a method with ranks per head must raise an AdapterError"
            )
        loop = Loop(self._first, self.make(), steps=self.steps, **lora).run()
        _require_plain(loop, tmp_path)

    def test_with_rank_stabilised_scaling(self, tmp_path: Path) -> None:
        _require_plain(
            Loop(self._first, self.make(), steps=self.steps, **{**self.lora, "use_rslora": True}).run(), tmp_path
        )

    @property
    def _first(self) -> TinyModel:
        return next(iter(self.models.values()))


def with_adapter(model: TinyModel, **lora: Any) -> nn.Module:
    """The model with a new LoRA adapter, in training mode."""
    return make_peft_model(model.make(), **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}).train()


def probe_logits(model: nn.Module, kind: TinyModel) -> Tensor:
    """The logits for the probe batch in evaluation mode. Afterwards the model is in training mode."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**kind.batch(PROBE)).logits
    model.train()
    return logits


def _require(holds: bool, contract: str, found: str = "") -> None:
    # Not an assert statement: pytest would show its condition instead of the contract, and `python -O` removes it.
    if not holds:
        raise AssertionError(contract + (f".\n{found}" if found else ""))


def _require_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor], contract: str) -> None:
    _require(first.keys() == second.keys(), contract, f"only in one: {sorted(first.keys() ^ second.keys())}")
    differing = [name for name, value in first.items() if not torch.equal(value, second[name])]
    _require(not differing, contract, f"differing: {differing}")


def _require_close(found: Tensor, expected: Tensor, rtol: float, contract: str) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0.1 * rtol, msg=lambda detail: f"{contract}.\n{detail}")


def _require_plain(loop: Loop, folder: Path) -> None:
    """The adapter that ``save_pretrained`` writes now must give the live model's logits without lorank."""
    loop.model.save_pretrained(str(folder / "adapter"))  # type: ignore[operator]  # PEFT
    _require_plain_folder(folder / "adapter", loop.kind, loop.logits(), folder)


def _require_plain_folder(adapter: Path, model: TinyModel, live: Tensor, scratch: Path) -> None:
    base = scratch / "base"
    model.make().save_pretrained(base)
    found = plain_peft().logits(base, adapter, model.batch(PROBE), model.auto)
    why = (
        f"the adapter in {adapter}, loaded by PEFT alone, must give the outputs of the live model. Change the effect "
        "of a rank only through its gate (layers.learn_gates), which is folded into B when weights are saved"
    )
    _require_close(found["logits"], live, 1e-5, why)
    _require_close(found["merged"], live, 1e-4, f"{why} (merged into the base weights)")


def _check_state(state: Any, step: int) -> None:
    contract = (
        "the state must be one dictionary from names to detached tensors: it is saved in the optimiser's state dict "
        "and loaded with weights_only=True. Store numbers as tensors of shape (), and write nested names as 'a.b'"
    )
    _require(isinstance(state, dict), contract, f"after step {step} it is a {type(state).__name__}")
    for name, value in state.items():
        found = f"after step {step}, {name!r} is a {type(value).__name__}"
        _require(isinstance(name, str) and isinstance(value, Tensor), contract, found)
        _require(not value.requires_grad, contract, f"after step {step}, {name!r} requires a gradient")
