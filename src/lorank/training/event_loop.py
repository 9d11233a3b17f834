"""The event loop of a run: allocates ranks while the model trains.

Allocation runs in PyTorch's step hooks, so the training loop needs no further calls:

    forward → backward → [before the step: the method reads the gradients]
            → the optimiser's step → [after the step: the method's own step; due? score → decide → resize → history]

The integrations of the run (processes, a gradient scaler, ``torch.compile``, the fused forward, …) are notified in
between (:mod:`lorank.training.integrations.base`). The state for an exact resume is saved inside the optimiser's
``state_dict`` (:mod:`lorank.training.checkpoint.rank_state`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lorank.allocators import Allocation, Allocator, Context, ResolvedBudget, State, TrainingInfo
from lorank.errors import LorankError, ValidationBatchError
from lorank.lora import (
    AdapterLayers,
    LayersSnapshot,
    fold_gates_,
    is_compiled,
    merge_heads_,
    rank_origins,
    resize_,
    resize_on_load,
    save_adapter,
)
from lorank.scoring.loss import LossFn
from lorank.training import attached_runs
from lorank.training.attached_runs import RunBeginning
from lorank.training.budget_enforcement import prune_to_budget_
from lorank.training.checkpoint.rank_state import (
    STATE_KEY,
    check_resumable,
    rank_state,
    restore_layers_,
    restore_progress_,
)
from lorank.training.checks import (
    check_in_use,
    check_optimizer_state,
    check_run,
    check_state_follows,
    require_trainable,
)
from lorank.training.history import RankHistory, Record, record_of
from lorank.training.integrations.base import Integrations, StepSkipped
from lorank.training.integrations.budget_notice import BudgetNotice
from lorank.training.integrations.fused_forward import FusedForward
from lorank.training.integrations.grad_scaling import GradScaling
from lorank.training.integrations.no_allocation_warning import NoAllocationWarning
from lorank.training.integrations.nonfinite_checks import NonfiniteChecks, require_finite_weights
from lorank.training.integrations.optimizer_checks import OptimizerChecks
from lorank.training.integrations.pass_watching import PassWatching
from lorank.training.integrations.quantised_base import QuantisedBase
from lorank.training.integrations.statistics_notice import StatisticsNotice
from lorank.training.integrations.torch_compile import TorchCompile
from lorank.training.integrations.unused_modules import UnusedModules
from lorank.training.learning_rate import ScaledRate
from lorank.training.load_hook import LoadHook
from lorank.training.log_lines import AllocationLines, log_summary, show_lines
from lorank.training.model_card import about_run
from lorank.training.parallel import find_backend, inner_model
from lorank.training.parallel.coordinator import ProcessCoordinator
from lorank.training.parallel.process_group import ProcessGroup, is_first_process
from lorank.training.plotting import plot
from lorank.training.progress import Report, scoring_progress
from lorank.training.run_start import start_
from lorank.training.run_state import RunState, TrainBatches
from lorank.training.step_hooks import StepHooks
from lorank.training.summary import Summary, summarise

if TYPE_CHECKING:
    import altair

logger = logging.getLogger("lorank")


class Ranks:
    """A run of rank allocation, made by :func:`~lorank.training.attach.attach`.

    ``print(ranks)`` says where the run is; :meth:`summary` what has come out of it so far.

    Attributes:
        history: the allocations so far, one :class:`~lorank.training.history.Record` each.
    """

    def __init__(
        self,
        layers: AdapterLayers,
        optimizer: torch.optim.Optimizer | Any,
        allocator: Allocator,
        info: TrainingInfo,
        *,
        model: nn.Module | None = None,
        validation_batch: Mapping[str, Any] | None = None,
        loss_fn: LossFn | None = None,
        history: RankHistory | None = None,
        progress: bool | Report | None = None,
        initial_ranks: Mapping[str, int] | None = None,
        fused: bool = True,
        compiled: bool = False,
        grad_scaler: Any = None,
        replace: bool = False,
        train_batches: TrainBatches = (),
        logs_summary: bool = True,
    ) -> None:
        show_lines()
        attached_runs.require_detached(layers, optimizer, replace=replace)
        model = model if model is not None else layers.model
        compiled = compiled or is_compiled(model)
        self._backend = find_backend(layers, model, optimizer)
        self._processes = ProcessGroup.of(layers)
        self._integrations = Integrations(
            [
                self._backend,
                QuantisedBase(),
                TorchCompile(compiled),
                GradScaling(optimizer, grad_scaler),
                ProcessCoordinator(self._processes, lockstep=self._backend.lockstep),
                NonfiniteChecks(),
                FusedForward(enabled=fused, compiled=compiled),
                PassWatching(compiled),
                NoAllocationWarning(),
                BudgetNotice(),
                StatisticsNotice(),
                OptimizerChecks(),
                UnusedModules(),
            ]
        )
        retried = attached_runs.interrupted_beginning(layers)
        made_with = retried.initial_ranks if retried is not None else initial_ranks or layers.ranks
        info = dataclasses.replace(info, initial_ranks=dict(made_with))
        run = RunState(
            layers,
            model,
            self._backend.optimizer,
            allocator,
            info,
            validation_batch,
            loss_fn,
            train_batches=train_batches,
            trained_model=inner_model(model),
        )
        self._run = run
        self._rate = ScaledRate(run.optimizer, layers)
        self.history = history if history is not None else RankHistory()
        self._progress = progress
        self._weights_replaced = False  # whether weights were loaded since the last step, without a rank state
        self._step_taken = True  # false for a step that the gradient scaler skips
        self._state_tried = False  # whether the optimiser's state was tried after its first step
        self._state_unused = False  # whether a rank state was loaded with the optimiser, and no step taken since
        check_run(run)
        with ExitStack() as undo:
            self._integrations.on_start(run)
            undo.callback(self._integrations.on_end, run)
            with ExitStack() as restore_on_error:
                restore_on_error.callback(self._backend.after_restore, run)
                restore_on_error.callback(LayersSnapshot(layers, run.optimizer).restore_)
                saved = run.optimizer.param_groups[0].get(STATE_KEY)
                if saved is not None:
                    restore_on_error.callback(run.optimizer.param_groups[0].__setitem__, STATE_KEY, saved)
                start_(run, self._integrations, saved, make_plain=self._make_plain, restore=self._restore)
                # Last, because an error must leave the history of an earlier run as it was.
                if saved is None:
                    self.history.begin(self._initial_record())
                else:
                    self.history.resume(run.step, self._initial_record())
                restore_on_error.pop_all()
            step_hooks = StepHooks(
                run.optimizer, self._begin_step, self._before_step, self._after_step, strict=allocator.moves_ranks
            )
            step_hooks.register()
            undo.callback(step_hooks.remove)
            for handle in (
                run.optimizer.register_state_dict_post_hook(self._add_rank_state),
                LoadHook(run.optimizer, self._apply_loaded_state),
                resize_on_load(layers, run.optimizer, self._on_weights_replaced),
            ):
                undo.callback(handle.remove)
            self._hooks = undo.pop_all()
        self._attached, self._logs_summary = True, logs_summary and is_first_process()
        self._lines = AllocationLines(self.history[-1], run.info.total_steps) if is_first_process() else None
        attached_runs.add(self)
        self._remember_beginning()

    @property
    def layers(self) -> AdapterLayers:
        """The LoRA layers."""
        return self._run.layers

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser whose steps are counted."""
        return self._run.optimizer

    @property
    def allocator(self) -> Allocator:
        """The method."""
        return self._run.allocator

    @property
    def info(self) -> TrainingInfo:
        """The length, seed and initial ranks of the run."""
        return self._run.info

    @property
    def by_module(self) -> dict[str, int]:
        """The present rank of each module."""
        return self._run.layers.ranks

    def summary(self) -> Summary:
        """What has come out of the run so far: what moved, where to, what it cost. ``print`` it, or show it in a
        notebook; ``summary().data`` has the numbers."""
        present = self._record(Allocation({}), {}, 0.0)
        return summarise(self.history, None if present.ranks == self.history[-1].ranks else present)

    def __repr__(self) -> str:
        method, layers = type(self.allocator).__name__, self.layers
        state = "finished" if self.finished else "attached" if self._attached else "detached"
        return (
            f"<Ranks: {method}, step {self.step} of {self.info.total_steps}, {state}; {layers.total_rank} ranks and "
            f"{layers.parameters:,} parameters in {len(layers)} modules>"
        )

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    @property
    def step(self) -> int:
        """The number of optimiser steps done."""
        return self._run.step

    @property
    def state(self) -> State:
        """The method's state, tensors by name."""
        return self._run.memory

    @property
    def budget(self) -> ResolvedBudget | None:
        """The budget that the ranks must fit at the end of the run, or None."""
        return self._run.budget

    @property
    def finished(self) -> bool:
        """Whether the method has ended: the last decision has been carried out, and the adapter is plain LoRA."""
        return self._run.finished

    @property
    def attached(self) -> bool:
        """Whether the run has its hooks in place: from :func:`lorank.attach` until :meth:`detach`."""
        return self._attached

    def detach(self) -> None:
        """Ends the run where it is and removes every hook. A second call does nothing.

        The adapter is plain LoRA afterwards: gates are folded into B, and a LoRA per head becomes one LoRA per module.
        The model's outputs do not change (gates other than one: up to rounding), and no rank is removed.

        If the method has not ended (:meth:`finish`), the next run of this adapter in this process counts as a retry:
        it has the same initial ranks, so budgets that depend on them are those of this run. Logs a warning if there was
        no allocation. Under DeepSpeed, all processes must call it together.
        """
        if not self._attached:
            return
        self._attached = False
        self._rate.restore()
        attached_runs.remove(self)
        if self._state_unused:  # the next run of this optimiser goes on from the checkpoint
            self._run.optimizer.param_groups[0][STATE_KEY] = self.state_dict()
        try:
            if not self._run.finished:
                self._make_plain()
        finally:
            self._hooks.close()
        if self._run.step:
            self._log_summary()

    def finish(self) -> None:
        """Ends the method: carries out its last decision, folds gates into B, and turns the adapter into plain LoRA.

        This happens automatically after the last of ``total_steps``, and at the end of a Trainer's run. A loop that
        stops earlier must call it. If weights were loaded since the last step (those of the best checkpoint), these
        weights are kept. Only ranks that exceed the budget are pruned, with a warning in the log.

        Raises:
            LorankError: the run was detached before it had finished.
        """
        run = self._run
        if run.finished and (not self._weights_replaced or not self._attached):
            return
        self._require_attached("finish")
        self._integrations.before_read(run)
        context = run.context()
        if not run.finished and not self._weights_replaced:
            allocation = run.allocator.finish(context, run.memory)
            self._integrations.on_decision(run, allocation)
            if allocation is not None:
                self._carry_out(allocation, context, 0.0)
        fold_gates_(run.layers)
        merge_heads_(run.layers, run.optimizer)
        run.finished = True
        attached_runs.forget_beginning(run.layers)
        if run.budget is not None and not run.budget.fits(run.layers.ranks):
            before = run.layers.ranks
            allocation = prune_to_budget_(run.layers, run.budget, run.optimizer)
            self._note(self._record(allocation, before, 0.0))
        self._integrations.after_resize(run)
        self._integrations.after_allocation(run)
        self._log_summary()

    def save_adapter(self, directory: str | Path, about: Mapping[str, str] | None = None) -> None:
        """Saves the present adapter in plain PEFT form, like :func:`lorank.save_adapter`, also with several processes.

        All processes must call this method. Process 0 writes, and all return when the files are complete. The model
        card, ``README.md``, names method, budget and ranks.

        Args:
            directory: the destination. An adapter in this folder is replaced; other files in it are never touched.
            about: further lines of the model card, for example ``{"Data": "e2e_nlg"}``.

        Raises:
            AdapterError, WriteError: see :func:`lorank.save_adapter`.
        """
        with self._backend.gathered():
            if is_first_process():
                save_adapter(self.layers, directory, {**self.about(), **(about or {})})
        self._processes.barrier()

    def about(self) -> dict[str, str]:
        """What the adapter's model card says of this run, label → text: method with settings, budget, steps."""
        return about_run(self._run)

    def plot(self, show: Literal["rank", "change"] = "rank") -> altair.Chart:
        """The ranks of every module over the run, with a slider, as a chart that notebooks show and ``save`` writes.

        Args:
            show: "rank", or "change": gained and lost (:func:`~lorank.training.plotting.numbers_of` says from where).

        Raises:
            MissingPackageError: altair is not installed.
        """
        return plot(list(self.history), show=show, made=self.info.initial_ranks)

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact resume, in addition to weights and optimiser. Plain types and tensors.

        The optimiser's own ``state_dict`` contains this state, so most loops never call this method.
        """
        return rank_state(self._run)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``: restores the ranks, the step count and the method's state.

        Call it before or after loading the model's weights. The optimiser's state must be from the same step.

        Args:
            state: the result of :meth:`state_dict`.

        Raises:
            ResumeError: the state is damaged, or is of another method, setting, seed, base model or adapter.
            OptimizerStateError: the optimiser's state does not fit the restored ranks.
            LorankError: the run was detached.
        """
        self._require_attached("load_state_dict")
        self._restore(state)
        self._remember_beginning()
        self.history.resume(self._run.step, self._initial_record())

    def _restore(self, state: Mapping[str, Any]) -> None:
        run = self._run
        check_resumable(state, run)
        restore_layers_(run, state)
        self._integrations.before_read(run)
        check_optimizer_state(run)
        restore_progress_(run, state)
        run.learns_gates = run.layers.gates is not None
        self._weights_replaced = False
        self._rate.restore()
        if run.layers.gramians is not None:  # passes of the run as it was before do not count
            run.layers.gramians.clear()
            run.layers.gramians.collecting = not run.finished
        self._integrations.after_resize(run)

    def _remember_beginning(self) -> None:
        """Notes how this run began, for the case that it stops before its end."""
        run = self._run
        if run.finished:
            attached_runs.forget_beginning(run.layers)
        else:
            beginning = RunBeginning(run.allocator.describe(), run.info.initial_ranks)
            attached_runs.remember_beginning(run.layers, beginning)

    def _require_attached(self, method: str) -> None:
        if not self._attached:
            raise LorankError(
                f"ranks.{method}() after ranks.detach(): the run has ended at step {self.step} of "
                f"{self.info.total_steps}, and its adapter is plain LoRA. Call {method} before detach, or begin "
                "another run with lorank.attach"
            )

    def _make_plain(self) -> None:
        """Folds gates into B, and turns a LoRA per head into one LoRA per module. Plain layers do not change at all."""
        layers = self._run.layers
        heads = {name: (layer.groups, layer.head_ranks) for name, layer in layers.items() if layer.groups is not None}
        if not heads and all(layer.gate is None for layer in layers.values()):
            return
        self._integrations.before_read(self._run)
        fold_gates_(layers)
        # Moments that were loaded with an unused rank state belong to the form that the next run restores.
        merge_heads_(layers, None if self._state_unused else self._run.optimizer)
        self._integrations.after_resize(self._run)
        beginning = attached_runs.interrupted_beginning(layers)
        if heads and beginning is not None:
            attached_runs.remember_beginning(layers, dataclasses.replace(beginning, heads=heads))

    # The hooks of the optimiser, in the order in which they run.

    def _begin_step(self) -> None:
        self._rate.restore()  # if the step before failed
        require_trainable(self._run)
        if STATE_KEY in self._run.optimizer.param_groups[0]:  # the optimiser's load_state_dict ran no hooks
            self._apply_loaded_state()

    def _before_step(self) -> None:
        run = self._run
        try:
            self._integrations.before_step(run)
        except StepSkipped:
            self._step_taken = False
            return
        self._step_taken = True
        run.record_learning_rate()
        if not run.finished:
            run.allocator.before_step(run.context(), run.memory)
            self._rate.multiply(run.allocator.lr_factor(run.context()))

    def _after_step(self) -> None:
        run = self._run
        self._rate.restore()
        if self._step_taken:
            if not self._state_tried and not run.finished:
                check_state_follows(run)
                self._state_tried = True
            run.step += 1
            self._weights_replaced = self._state_unused = False
            if not run.finished:
                run.allocator.after_step(run.context(), run.memory)
        if run.layers.gates is not None:
            run.layers.gates.clear_grad()
        if self._step_taken:
            if run.allocator.due(run.step, run.info) and not run.finished:
                self._allocate()
            if run.step == run.info.total_steps:
                self.finish()
        run.learns_gates = run.layers.gates is not None
        self._integrations.after_step(run)

    def _add_rank_state(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][STATE_KEY] = self.state_dict()

    def _apply_loaded_state(self) -> None:
        group = self._run.optimizer.param_groups[0]
        if STATE_KEY not in group:
            check_optimizer_state(self._run)
            return
        self.load_state_dict(group[STATE_KEY])
        del group[STATE_KEY]  # only now: a state that is refused stays in the optimiser
        self._state_unused = True

    def _on_weights_replaced(self) -> None:
        self._weights_replaced = True
        self._integrations.after_resize(self._run)  # the loaded weights may have other ranks

    def _allocate(self) -> None:
        run = self._run
        began = time.perf_counter()
        check_in_use(run.layers)
        self._integrations.before_read(run)
        require_finite_weights(run.layers, run.step)
        context = run.context()
        with scoring_progress(f"{type(run.allocator).__name__}, step {run.step}: scoring ranks", self._progress) as bar:
            try:
                allocation = run.allocator.allocate(dataclasses.replace(context, progress=bar), run.memory)
            except ValidationBatchError as error:
                raise ValidationBatchError(f"step {run.step}: {error}") from error
        self._integrations.on_decision(run, allocation)
        if allocation is not None:
            self._carry_out(allocation, context, time.perf_counter() - began)

    def _carry_out(self, allocation: Allocation, context: Context, seconds: float) -> None:
        run = self._run
        began = time.perf_counter()
        before = run.layers.ranks
        if allocation.plan:
            resize_(
                run.layers,
                allocation.plan,
                run.optimizer,
                seed=run.seed,
                second_moments=allocation.second_moments,
            )
            run.allocator.after_resize(context, run.memory, rank_origins(allocation.plan, before))
            self._integrations.after_resize(run)
        run.allocations += 1
        self._integrations.after_allocation(run)
        self._note(self._record(allocation, before, seconds + time.perf_counter() - began))

    def _note(self, record: Record) -> None:
        self.history.append(record)
        if self._lines is not None:
            self._lines.add(record)

    def _log_summary(self) -> None:
        """Logs the summary once, of a run whose method moves ranks."""
        if self._logs_summary and self.allocator.moves_ranks:
            log_summary(self.summary())
        self._logs_summary = False

    def _context(self) -> Context:
        return self._run.context()

    def _initial_record(self) -> Record:
        made = dict(self.info.initial_ranks)
        details: dict[str, Any] = {"begins": True, "total_steps": self.info.total_steps}
        details |= {} if made == self.layers.ranks else {"made": made}
        return self._record(Allocation({}, details=details), {}, 0.0)

    def _record(self, allocation: Allocation, before: Mapping[str, int], seconds: float) -> Record:
        return record_of(self.step, self.allocator, self.layers, allocation, before, seconds, self.budget)
