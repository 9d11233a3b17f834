"""A run's ranks while it trains: the event loop.

PyTorch's own step hooks do the work, so that allocation cannot be forgotten:

    forward → backward → [before the step: the method looks at the gradients]
            → the optimiser's step → [after it: the method's own step; due? score → decide → resize → history]

Whatever else accompanies the run (processes, a gradient scaler, ``torch.compile``, the fused forward, …) is notified in
between (:mod:`lorank.training.integrations.base`). What a run needs to go on exactly where it stopped travels inside
the optimiser's ``state_dict`` (:mod:`lorank.training.checkpoint.rank_state`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorank.allocators import Allocation, Allocator, Context, ResolvedBudget, State, TrainingInfo
from lorank.errors import ValidationBatchError
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
    split_into_heads_,
)
from lorank.scoring.loss import LossFn
from lorank.training.budget_enforcement import prune_to_budget_
from lorank.training.checkpoint.base_fingerprint import base_fingerprint
from lorank.training.checkpoint.rank_state import (
    STATE_KEY,
    check_resumable,
    rank_state,
    restore_layers_,
    restore_progress_,
)
from lorank.training.checks import check_batch, check_optimizer_state, check_run
from lorank.training.history import RankHistory, Record, log_record, record_of
from lorank.training.integrations.base import Integrations, StepSkipped
from lorank.training.integrations.fused_forward import FusedForward
from lorank.training.integrations.grad_scaling import GradScaling
from lorank.training.integrations.no_allocation_warning import NoAllocationWarning
from lorank.training.integrations.nonfinite_checks import NonfiniteChecks, require_finite_weights
from lorank.training.integrations.quantised_base import QuantisedBase
from lorank.training.integrations.torch_compile import TorchCompile
from lorank.training.parallel import find_backend
from lorank.training.parallel.coordinator import ProcessCoordinator
from lorank.training.parallel.process_group import ProcessGroup, is_first_process
from lorank.training.progress import Report, scoring_progress
from lorank.training.run_state import RunState


class Ranks:
    """A run's ranks while it trains; made by :func:`~lorank.training.attach.attach`.

    Attributes:
        history: what was allocated, a :class:`~lorank.training.history.Record` each.
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
    ) -> None:
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
                FusedForward(wanted=fused, compiled=compiled),
                NoAllocationWarning(),
            ]
        )
        info = replace(info, initial_ranks=dict(initial_ranks or layers.ranks))
        run = RunState(layers, model, self._backend.optimizer, allocator, info, validation_batch, loss_fn)
        self._run = run
        self.history = history if history is not None else RankHistory()
        self._progress = progress
        self._foreign = False  # weights were loaded that the state knows nothing about
        self._stepping = True  # false in a step that the gradient scaler skips
        check_run(run)
        with ExitStack() as undo:
            self._integrations.on_start(run)
            undo.callback(self._integrations.on_end, run)
            with ExitStack() as unchanged:
                unchanged.callback(LayersSnapshot(layers, run.optimizer).restore_)
                saved = run.optimizer.param_groups[0].get(STATE_KEY)
                if saved is not None:
                    unchanged.callback(run.optimizer.param_groups[0].__setitem__, STATE_KEY, saved)
                self._begin(saved)
                unchanged.pop_all()
            for handle in (
                run.optimizer.register_step_pre_hook(self._before_step),
                run.optimizer.register_step_post_hook(self._after_step),
                run.optimizer.register_state_dict_post_hook(self._put_state),
                run.optimizer.register_load_state_dict_post_hook(lambda _: self._absorb_loaded_state()),
                resize_on_load(layers, run.optimizer, self._note_foreign_weights),
            ):
                undo.callback(handle.remove)
            self._attached = undo.pop_all()

    @property
    def layers(self) -> AdapterLayers:
        """The LoRA layers."""
        return self._run.layers

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser whose steps count."""
        return self._run.optimizer

    @property
    def allocator(self) -> Allocator:
        """The method."""
        return self._run.allocator

    @property
    def info(self) -> TrainingInfo:
        """Length, seed and initial ranks of the run."""
        return self._run.info

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self._run.step

    @property
    def state(self) -> State:
        """What the method remembers, by name."""
        return self._run.memory

    @property
    def budget(self) -> ResolvedBudget | None:
        """What the ranks fit at the end of the run, or None."""
        return self._run.budget

    def detach(self) -> None:
        """Ends allocation: every hook is removed. Ranks stay as they are. Warns if no allocation ever happened."""
        self._attached.close()

    def finish(self) -> None:
        """Ends the method: its last decision is carried out, gates are folded into B, the adapter is plain LoRA.

        Happens by itself after the last of ``total_steps``, and at the end of a Trainer's run; a loop that stops
        before calls it. Where weights were loaded since the last step (the best checkpoint's), those stay, and only
        what is over the budget is pruned, with a warning.
        """
        run = self._run
        if run.finished and not self._foreign:
            return
        self._integrations.before_read(run)
        context = run.context()
        if not run.finished and not self._foreign:
            allocation = run.allocator.finish(context, run.memory)
            self._integrations.on_decision(run, allocation)
            if allocation is not None:
                self._carry_out(allocation, context, 0.0)
        fold_gates_(run.layers)
        merge_heads_(run.layers, run.optimizer)
        run.finished = True
        if run.budget is not None and not run.budget.fits(run.layers.ranks):
            before = run.layers.ranks
            allocation = prune_to_budget_(run.layers, run.budget, run.optimizer)
            self.history.append(self._record(allocation, before, 0.0))
        self._integrations.after_resize(run)
        self._integrations.after_allocation(run)

    def save_adapter(self, directory: str | Path) -> None:
        """Saves the adapter as it is now, in plain PEFT form: :func:`lorank.save_adapter`, with several processes too.

        All processes call it, process 0 writes, and all return when the files are there.

        Args:
            directory: where to; an adapter that is there already is replaced.
        """
        with self._backend.whole():
            if is_first_process():
                save_adapter(self.layers, directory)
        self._processes.wait()

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides weights and optimiser. Plain types and tensors.

        The optimiser's own ``state_dict`` carries it too, so most loops never call this.
        """
        return rank_state(self._run)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken: ranks take their shapes, steps their count.

        Load it before or after the model's weights; the optimiser's state must be of the same moment.

        Raises:
            ResumeError: it is damaged, or of another method, other settings, another seed, base model or adapter.
        """
        run = self._run
        check_resumable(state, run)
        restore_layers_(run, state)
        self._integrations.before_read(run)
        check_optimizer_state(run)
        restore_progress_(run, state)
        self._foreign = False
        self.history.resume(run.step, self._beginning())
        self._integrations.after_resize(run)

    def _begin(self, saved: Mapping[str, Any] | None) -> None:
        """Brings the layers into the form and to the ranks that the method begins with, or goes on with."""
        run = self._run
        layers, allocator, optimizer = run.layers, run.allocator, run.optimizer
        if saved is None:
            self._integrations.before_read(run)
        check_batch(run)
        run.base = base_fingerprint(layers)
        if saved is not None:
            check_resumable(saved, run)
            restore_layers_(run, saved)
        elif groups := allocator.heads_of(layers):
            split_into_heads_(layers, groups, optimizer, seed=run.seed - 1)  # other draws than the initial plan's
        run.budget = allocator.resolve_budget(layers, run.info)
        if saved is None:
            check_optimizer_state(run)
            resize_(layers, allocator.initial_plan(layers, run.info), optimizer, seed=run.seed)
        # A finished run's weights are final: a method must not begin with them anew.
        run.memory = {} if saved and saved["finished"] else allocator.start(layers, run.info)
        self._absorb_loaded_state()
        if saved is None:
            self.history.begin(self._beginning())
            self._integrations.after_resize(run)
        self._integrations.after_allocation(run)

    # The optimiser's hooks, in the order in which they run.

    def _before_step(self, *_: Any) -> None:
        run = self._run
        if STATE_KEY in run.optimizer.param_groups[0]:  # an optimiser whose load_state_dict runs no hooks
            self._absorb_loaded_state()
        try:
            self._integrations.before_step(run)
        except StepSkipped:
            self._stepping = False
            return
        self._stepping = True
        if not run.finished:
            run.allocator.before_step(run.context(), run.memory)

    def _after_step(self, *_: Any) -> None:
        run = self._run
        if self._stepping:
            run.step += 1
            self._foreign = False
            if not run.finished:
                run.allocator.after_step(run.context(), run.memory)
        if run.layers.gates is not None:
            run.layers.gates.clear_grad()
        if self._stepping:
            if run.allocator.due(run.step, run.info) and not run.finished:
                self._allocate()
            if run.step == run.info.total_steps:
                self.finish()
        self._integrations.after_step(run)

    def _put_state(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][STATE_KEY] = self.state_dict()

    def _absorb_loaded_state(self) -> None:
        group = self._run.optimizer.param_groups[0]
        if STATE_KEY not in group:
            check_optimizer_state(self._run)
            return
        self.load_state_dict(group[STATE_KEY])
        del group[STATE_KEY]  # not before: a state that is refused is still there for who mends what is wrong

    def _note_foreign_weights(self) -> None:
        self._foreign = True
        self._integrations.after_resize(self._run)  # they may have come with other ranks

    def _allocate(self) -> None:
        run = self._run
        began = time.perf_counter()
        self._integrations.before_read(run)
        require_finite_weights(run.layers, run.step)
        context = run.context()
        with scoring_progress(f"{type(run.allocator).__name__}, step {run.step}: scoring ranks", self._progress) as bar:
            try:
                allocation = run.allocator.allocate(replace(context, progress=bar), run.memory)
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
            resize_(run.layers, allocation.plan, run.optimizer, seed=run.seed)
            run.allocator.after_resize(context, run.memory, rank_origins(allocation.plan, before))
            self._integrations.after_resize(run)
        run.allocations += 1
        self._integrations.after_allocation(run)
        record = self._record(allocation, before, seconds + time.perf_counter() - began)
        self.history.append(record)
        log_record(record)

    def _context(self) -> Context:
        return self._run.context()

    def _beginning(self) -> Record:
        return self._record(Allocation({}, details={"begins": True}), {}, 0.0)

    def _record(self, allocation: Allocation, before: Mapping[str, int], seconds: float) -> Record:
        return record_of(self.step, self.allocator, self.layers, allocation, before, seconds)
