"""Progress of a training run: a live view on a terminal, and one line per evaluation on any console.

The view has the step, the time left, the loss or the progress of scoring, the use of the budget, and per projection its
ranks after every allocation as a sparkline. Everything that prints meanwhile must use the same console.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorank.experiments.time_left import TimeLeft
from lorank.training import RankCallback, Ranks
from lorank.training.summary import budget_text, by_projection

BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 24
"""The most points of a sparkline: the last ones."""
PROJECTIONS = 12
"""The most sparklines. More projections than these, as of a model with experts, are left out."""


class TrainingProgress(TrainerCallback):
    """Shows the progress of a Trainer. Use it as a context around `trainer.train()`: the view also ends after an error.

    Args:
        console: the console to write to; the view appears only if the console is a terminal.

    Attributes:
        ranks: the callback that moves the ranks, which must be before this one among the Trainer's callbacks; None:
            there are no ranks.
    """

    def __init__(self, console: Console) -> None:
        self.ranks: RankCallback | None = None
        self._console = console
        self._spinner = Spinner("dots")
        self._step = self._total = 0
        self._status = ""
        self._left = TimeLeft(0)
        self._known = 0  # records of the history whose times are noted
        self._mark = self._estimated_at = time.perf_counter()
        self._estimate: float | None = None
        self._scoring_since: float | None = None
        self._ranks_view: list[RenderableType] = []  # the view is drawn by another thread, while ranks move
        self._live = Live(get_renderable=self._view, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def scoring(self, done: int, total: int) -> None:
        """Shows the progress of scoring, which can take minutes, in the place of the loss."""
        now = time.perf_counter()
        self._scoring_since = self._scoring_since or now
        self._status = f"scoring ranks: {done} of {total}"
        if done and not self._left.knows_allocations:  # the first: how long it and each later one will take
            each = (now - self._scoring_since) * total / done
            known = self._left.seconds(self._step)
            if known is not None:
                later = self._left.allocations(self._step) - 1
                self._note_estimate(known + each * (1 - done / total) + each * max(0, later))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self._run
        allocations = [] if run is None else run.allocator.schedule(run.info)
        evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps"
        self._total, self._step = state.max_steps, state.global_step
        self._left = TimeLeft(state.max_steps, allocations, int(state.eval_steps) if evaluates else None)
        self._known = 0 if run is None else len(run.history)
        self._ranks_view = [] if run is None else _ranks_view(run)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now, run = time.perf_counter(), self._run
        new = [] if run is None else list(run.history)[self._known :]
        self._known += len(new)
        for record in new:
            self._left.add_allocation(record.seconds)
        self._left.add_step(max(0.0, now - self._mark - sum(record.seconds for record in new)))
        self._mark, self._step, self._scoring_since = now, state.global_step, None
        self._note_estimate(self._left.seconds(self._step))
        if new and run is not None:
            self._status, self._ranks_view = "", _ranks_view(run)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._left.add_evaluation(time.perf_counter() - self._mark)
        self._note_estimate(self._left.seconds(self._step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._status = f"loss {float(logs['loss']):.3f}"
        if "eval_loss" in logs:
            self._console.print(
                f"step {state.global_step}/{state.max_steps}: validation loss {float(logs['eval_loss']):.4f}",
                highlight=False,
            )

    @property
    def _run(self) -> Ranks | None:
        return None if self.ranks is None else self.ranks.ranks

    def _note_estimate(self, seconds: float | None) -> None:
        self._estimate, self._estimated_at = seconds, time.perf_counter()

    def _time_left(self) -> str:
        if self._estimate is None:
            return "–:––"
        seconds = max(0, round(self._estimate - (time.perf_counter() - self._estimated_at)))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        text = f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        unknown = 0 if self._left.knows_allocations or self._scoring_since else self._left.allocations(self._step)
        return f"{text} left" + (f" and {unknown} × scoring" if unknown else "")

    def _view(self) -> RenderableType:
        first = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._total or None, completed=self._step, width=30)
        steps = f"step {self._step} of {self._total}" if self._total else "starting"
        first.add_row(self._spinner, bar, steps, Text(self._time_left(), "cyan"), Text(self._status, "dim"))
        return Group(first, *self._ranks_view)


def _ranks_view(run: Ranks) -> list[RenderableType]:
    """The use of the budget, and a sparkline per projection."""
    ranks = run.by_module
    budget = "" if run.budget is None else f"; budget: {budget_text(run.budget.used(ranks))}"
    line = Text(f"{sum(ranks.values()):,} ranks, {run.layers.parameters:,} parameters{budget}")
    table = Table.grid(padding=(0, 1))
    points = [by_projection({name: {"rank": rank} for name, rank in record.ranks.items()}) for record in run.history]
    points = points[-POINTS:]
    highest = max((own["rank"] for point in points for own in point.values()), default=0)
    for projection in list(points[-1])[:PROJECTIONS]:
        values = [point[projection]["rank"] for point in points]
        change = f"{values[0]} → {values[-1]}" if values[0] != values[-1] else str(values[-1])
        table.add_row(projection, Text(sparkline(values, highest), "green"), change)
    return [line, table]


def sparkline(values: Sequence[int], highest: int) -> str:
    """One block per value, from the lowest for 0 to the full one for ``highest``."""
    return "".join(BLOCKS[round(value / highest * (len(BLOCKS) - 1)) if highest else 0] for value in values)
