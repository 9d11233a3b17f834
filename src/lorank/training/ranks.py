"""A run's ranks while it trains.

PyTorch's own step hooks do the work, so that allocation cannot be forgotten:

    forward → backward → [before step: observe] → step → [after step: project; due? allocate → resize → history]

What a run needs to go on exactly where it stopped travels inside the optimiser's ``state_dict`` (under a key of its
own in the first parameter group): who saves and loads their optimiser has saved and loaded the ranks' state too.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorank.allocators import Allocation, Allocator, Context, TrainingInfo
from lorank.errors import ValidationBatchError
from lorank.lora import (
    AdapterLayers,
    fold_gates_,
    is_compiled,
    merge_heads_,
    prevent_repacking,
    rank_origins,
    resize_,
    resize_on_load,
    restore_layout_,
    save_adapter,
    split_into_heads_,
)
from lorank.training.budget_enforcement import prune_to_budget_
from lorank.training.checkpoint.base_fingerprint import base_fingerprint
from lorank.training.checkpoint.layer_state import STATE_KEY, layers_state, load_gated_state, saved_heads, take_ranks_
from lorank.training.checkpoint.state_schema import sealed
from lorank.training.checks import VERSION, LossFn, check_batch, check_optimizer_state, check_resumable, check_run
from lorank.training.fusing import Fusing
from lorank.training.grad_scaling import GradScaling
from lorank.training.history import RankHistory, Record, record_of, tell
from lorank.training.no_allocation_warning import NoAllocationWarning
from lorank.training.nonfinite_checks import require_finite_gradients, require_finite_scores, require_finite_weights
from lorank.training.parallel.coordinator import ProcessCoordinator
from lorank.training.parallel.deepspeed import torch_optimizer
from lorank.training.parallel.process_group import is_first_process
from lorank.training.progress import Report, scoring_progress
from lorank.training.torch_compile import Compiling


class Ranks:
    """A run's ranks while it trains; made by :func:`~lorank.training.attach.attach`.

    Attributes:
        layers: the LoRA layers.
        step: optimiser steps done.
        history: what was allocated, a :class:`~lorank.training.history.Record` each.
        budget: what the ranks fit at the end of the run, or None.
    """

    def __init__(
        self,
        layers: AdapterLayers,
        optimizer: torch.optim.Optimizer | Any,
        allocator: Allocator,
        run: TrainingInfo,
        *,
        validation_batch: Mapping[str, Any] | None = None,
        loss_fn: LossFn | None = None,
        history: RankHistory | None = None,
        progress: bool | Report | None = None,
        initial_ranks: Mapping[str, int] | None = None,
        outer: nn.Module | None = None,
        fused: bool = True,
        compiled: bool = False,
        grad_scaler: Any = None,
    ) -> None:
        self.layers = layers
        self.optimizer = torch_optimizer(layers, optimizer)
        self.allocator = allocator
        self.run = replace(run, initial_ranks=dict(initial_ranks or layers.ranks))
        self.history = history if history is not None else RankHistory()
        self.step = 0
        self._validation_batch = validation_batch
        self._loss_fn = loss_fn
        self._progress = progress
        self._finished = False
        self._foreign = False  # weights were loaded that the state knows nothing about
        outer = outer if outer is not None else layers.model
        compiled = compiled or is_compiled(outer)
        self._fusing = Fusing(layers, wanted=fused, compiled=compiled)
        check_run(layers, self.optimizer, self.run)
        self._compiling = Compiling(layers, compiled, per_head=bool(allocator.heads_of(layers)))
        base = prevent_repacking(layers.model)
        self._together = ProcessCoordinator(layers, outer, self.optimizer)
        if STATE_KEY not in self.optimizer.param_groups[0]:
            self._together.fetch()
        self._together.check_start(allocator, self.run, validation_batch)
        check_batch(layers, allocator, validation_batch, loss_fn)
        self._base_values = base_fingerprint(layers)
        saved = self.optimizer.param_groups[0].get(STATE_KEY)
        if saved is not None:
            check_resumable(saved, layers, allocator, self.run)
            restore_layout_(layers, saved_heads(saved))
        elif groups := allocator.heads_of(layers):
            split_into_heads_(
                layers, groups, self.optimizer, seed=self._seed() - 1
            )  # other draws than the initial plan's
        self.budget = allocator.resolve_budget(layers, self.run)
        if saved is None:
            check_optimizer_state(layers, self.optimizer)
            resize_(layers, allocator.initial_plan(layers, self.run), self.optimizer, seed=self._seed())
        # A finished run's weights are final: a method must not begin with them anew.
        self.state = {} if saved and saved["finished"] else allocator.start(layers, self.run)
        self._fate = NoAllocationWarning(allocator, self.run)
        self._end = weakref.finalize(self, self._fate.tell)
        self._absorb_loaded_state()
        if saved is None:
            self.history.begin(self._beginning())
        self._together.follow()
        self._together.check_state(self.step, self.state)
        self._scaling = GradScaling(layers, optimizer, grad_scaler)
        self._stepping = True  # false in a step that the gradient scaler skips
        if saved is None:
            self._fusing.follow(self._finished)
        self._together.begin()
        self._handles: list[Any] = [  # each has remove()
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_state_dict_post_hook(self._put_state),
            self.optimizer.register_load_state_dict_post_hook(lambda _: self._absorb_loaded_state()),
            resize_on_load(layers, self.optimizer, self._note_foreign_weights),
            base,
        ]

    def detach(self) -> None:
        """Ends allocation: every hook is removed. Ranks stay as they are. Says so if no allocation ever happened."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._fusing.end()
        self._scaling.close()
        self._compiling.end()
        self._together.close()
        self._end()

    def finish(self) -> None:
        """Ends the method: its last decision is carried out, gates are folded into B, the adapter is plain LoRA.

        Happens by itself after the last of ``total_steps``, and at the end of a Trainer's run; a loop that stops
        before calls it. Where weights were loaded since the last step (the best checkpoint's), those stay, and only
        what is over the budget is pruned, with a warning.
        """
        if self._finished and not self._foreign:
            return
        self._together.fetch()
        context = self._context()
        if not self._finished and not self._foreign:
            allocation = self.allocator.finish(context, self.state)
            if allocation is not None:
                self._carry_out(allocation, context, 0.0)
        fold_gates_(self.layers)
        merge_heads_(self.layers, self.optimizer)
        self._fusing.end()
        self._finished = True
        if self.budget is not None and not self.budget.fits(self.layers.ranks):
            before = self.layers.ranks
            allocation = prune_to_budget_(self.layers, self.budget, self.optimizer)
            self.history.append(self._record(allocation, before, 0.0))
        self._follow()
        self._together.check_state(self.step, self.state)

    def save_adapter(self, directory: str | Path) -> None:
        """Saves the adapter as it is now, in plain PEFT form: :func:`lorank.save_adapter`, with several processes too.

        All processes call it, process 0 writes, and all return when the files are there.

        Args:
            directory: where to; an adapter that is there already is replaced.
        """
        with self._together.whole():
            if is_first_process():
                save_adapter(self.layers, directory)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides weights and optimiser. Plain types and tensors.

        The optimiser's own ``state_dict`` carries it too, so most loops never call this.
        """
        state = {
            "version": VERSION,
            "step": self.step,
            "allocations": self._fate.allocations,
            "allocator": self.allocator.describe(),
            "seed": self.run.seed,
            "finished": self._finished,
            "initial_ranks": dict(self.run.initial_ranks),
            **layers_state(self.layers),
            "base": self._base_values,
            "state": {name: tensor.detach().clone() for name, tensor in self.state.items()},
        }
        return sealed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken: ranks take their shapes, steps their count.

        Load it before or after the model's weights; the optimiser's state must be of the same moment.

        Raises:
            ResumeError: it is damaged, or of another method, other settings, another seed, base model or adapter.
        """
        check_resumable(state, self.layers, self.allocator, self.run)
        restore_layout_(self.layers, saved_heads(state))
        take_ranks_(self.layers, state["ranks"])  # the optimiser brings its own state, already of these shapes
        self._together.fetch()
        check_optimizer_state(self.layers, self.optimizer)
        load_gated_state(self.layers, state["gated"])
        self.step = state["step"]
        self._finished = state["finished"]
        self._foreign = False
        self.state = {name: tensor.clone() for name, tensor in state["state"].items()}
        self._fate.allocations = state["allocations"]
        self.history.resume(self.step, self._beginning())
        self._fusing.follow(self._finished)
        self._follow()

    # The optimiser's hooks, in the order in which they run.

    def _before_step(self, *_: Any) -> None:
        if STATE_KEY in self.optimizer.param_groups[0]:  # an optimiser whose load_state_dict runs no hooks
            self._absorb_loaded_state()
        self._stepping = self._scaling.settle_(self.optimizer)
        if not self._stepping:
            return
        self._together.average_gates()
        if not self._finished:
            with self._together.gradients(self.allocator):
                if self.allocator.moves_ranks:
                    require_finite_gradients(self.layers, self.optimizer, self.step + 1)
                self.allocator.before_step(self._context(), self.state)

    def _after_step(self, *_: Any) -> None:
        if not self._stepping:
            self._scaling.stepped()
            return
        self.step += 1
        self._foreign = False
        context = self._context()
        if not self._finished:
            self.allocator.after_step(context, self.state)
        self._scaling.stepped()
        if self.allocator.due(self.step, self.run) and not self._finished:
            self._allocate(context)
        if self.step == self.run.total_steps:
            self.finish()
            self._end()

    def _put_state(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][STATE_KEY] = self.state_dict()

    def _absorb_loaded_state(self) -> None:
        state = self.optimizer.param_groups[0].pop(STATE_KEY, None)
        if state is not None:
            self.load_state_dict(state)
        else:
            check_optimizer_state(self.layers, self.optimizer)

    def _note_foreign_weights(self) -> None:
        self._foreign = True
        self._follow()  # they may have come with other ranks

    def _follow(self) -> None:
        """Ranks may have moved: what holds on to the old shapes is made anew."""
        self._together.follow()
        self._compiling.follow()

    def _allocate(self, context: Context) -> None:
        began = time.perf_counter()
        self._together.fetch()
        require_finite_weights(self.layers, self.step)
        with scoring_progress(
            f"{type(self.allocator).__name__}, step {self.step}: scoring ranks", self._progress
        ) as bar:
            try:
                allocation = self.allocator.allocate(replace(context, progress=bar), self.state)
            except ValidationBatchError as error:
                raise ValidationBatchError(f"step {self.step}: {error}") from error
        if allocation is not None:
            require_finite_scores(allocation.scores, self.step, type(self.allocator).__name__)
        self._together.check_decision(self.step, allocation)
        if allocation is None:
            return
        self._carry_out(allocation, context, time.perf_counter() - began)

    def _carry_out(self, allocation: Allocation, context: Context, seconds: float) -> None:
        began = time.perf_counter()
        before = self.layers.ranks
        if allocation.plan:
            resize_(self.layers, allocation.plan, self.optimizer, seed=self._seed())
            self.allocator.after_resize(context, self.state, rank_origins(allocation.plan, before))
            self._follow()
        self._together.check_state(self.step, self.state)
        record = self._record(allocation, before, seconds + time.perf_counter() - began)
        self.history.append(record)
        self._fate.allocations += 1
        tell(record)

    def _seed(self) -> int:
        """Another one for each allocation, so that a rank that returns is not the one that went."""
        return self.run.seed * 1_000_003 + self.step

    def _context(self) -> Context:
        lr, peak_lr = _learning_rates(self.optimizer)
        return Context(
            self.step,
            self.run,
            self.layers.model,
            self.layers,
            self._validation_batch,
            self._loss_fn,
            lr=lr,
            peak_lr=peak_lr,
            share=self._together.share,
        )

    def _beginning(self) -> Record:
        return self._record(Allocation({}, details={"begins": True}), {}, 0.0)

    def _record(self, allocation: Allocation, before: Mapping[str, int], seconds: float) -> Record:
        return record_of(self.step, self.allocator, self.layers, allocation, before, seconds)


def _learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """The first parameter group's learning rate now, and the peak that its schedule multiplies."""
    group = optimizer.param_groups[0]
    lr = float(group.get("lr") or 0.0)
    return lr, float(group.get("initial_lr") or optimizer.defaults.get("lr") or lr)
