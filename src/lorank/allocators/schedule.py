"""The schedules of rank allocation, as pure functions of the optimiser step.

rounds (ALoRA, arXiv 2403.16187):    K1, K1 + K2, K1 + 2 K2, …              N_A of them at most
cubic (AdaLoRA, arXiv 2303.10512):   every ΔT steps from t_i to T − t_f     the budget falls as (1 − progress)³
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lorank.errors import ScheduleError
from lorank.scoring.context import TrainingInfo

PAPER_EPOCHS = 10.0
"""The assumed number of epochs of a run if the length of an epoch is unknown: ALoRA's longest training."""

K1, K2 = 0.1, 0.4 / 7
"""The default durations, as fractions of the run: the first of eight rounds at 10 %, the last in the middle."""

K1_EPOCHS, K2_EPOCHS = 1.0, 0.25
"""ALoRA's K1 and K2, in epochs."""

T_INIT, T_FINAL, DELTA_T = 0.13, 0.48, 0.002
"""The medians of the eight GLUE runs in AdaLoRA's scripts, as fractions of the run."""


@dataclass(frozen=True)
class RoundSchedule:
    """Training for K1, then up to N_A rounds with training for K2 between them. No round at the run's last step.

    Args:
        k1: K1, how long to train before the first round; None: 10 % of the run, or 1 epoch where ``unit`` is
            ``"epochs"``. > 0.
        k2: K2, how long to train between rounds; None: 5.7 % of the run, or 0.25 epoch where ``unit`` is ``"epochs"``.
            > 0.
        rounds: N_A, the highest number of rounds. ≥ 1.
        unit: what ``k1`` and ``k2`` count: the ``"run"`` (0.1 is a tenth of it), ``"epochs"`` or optimiser ``"steps"``.
    """

    k1: float | None
    k2: float | None
    rounds: int
    unit: Literal["run", "epochs", "steps"]

    def due(self, step: int, run: TrainingInfo) -> bool:
        """Whether a round comes after optimiser step ``step`` (from 1)."""
        first, every = self._first(run), self._interval(run)
        done, since = divmod(step - first, every)
        return since == 0 and 0 <= done < self.rounds and step < run.total_steps

    def last(self, run: TrainingInfo) -> int:
        """The step of the last round; 0 if there is no round."""
        first, every = self._first(run), self._interval(run)
        if first >= run.total_steps:
            return 0
        return first + every * min(self.rounds - 1, (run.total_steps - 1 - first) // every)

    def _first(self, run: TrainingInfo) -> int:
        """The step of the first round, ≥ 1."""
        return self._to_steps(self.k1, K1, K1_EPOCHS, run)

    def _interval(self, run: TrainingInfo) -> int:
        """Steps between two rounds, ≥ 1."""
        return self._to_steps(self.k2, K2, K2_EPOCHS, run)

    def _to_steps(self, duration: float | None, fraction: float, epochs: float, run: TrainingInfo) -> int:
        """``duration`` in steps; None: ``fraction`` of the run, or ``epochs``."""
        if self.unit == "epochs":
            return epochs_to_steps(epochs if duration is None else duration, run, PAPER_EPOCHS)
        if self.unit == "run" or duration is None:
            duration = (fraction if duration is None else duration) * run.total_steps
        return max(1, round(duration))


@dataclass(frozen=True)
class CubicSchedule:
    """A budget that stays at b0 until t_i, then falls cubically to b_T at T − t_f, and stays at b_T.

    Args:
        t_init: t_i, steps before the budget begins to fall; None: 13 % of the run. ≥ 0.
        t_final: t_f, steps with the final budget at the end of the run; None: 48 % of the run. ≥ 0.
        delta_t: ΔT, steps between two prunings; None: 0.2 % of the run, at least 1. ≥ 1.
    """

    t_init: int | None
    t_final: int | None
    delta_t: int | None

    def due(self, step: int, run: TrainingInfo) -> bool:
        """Whether ranks are pruned after optimiser step ``step`` (from 1)."""
        end = self.end(run)
        return step == end or (self.begin(run) < step < end and step % self._interval(run) == 0)

    def fraction(self, step: int, run: TrainingInfo) -> float:
        """The position of the budget between b0 (1) and b_T (0), after optimiser step ``step``."""
        begin, end = self.begin(run), self.end(run)
        if step <= begin:
            return 1.0
        return (1 - (step - begin) / (end - begin)) ** 3 if step < end else 0.0

    def begin(self, run: TrainingInfo) -> int:
        """t_i, the step after which the budget falls."""
        return round(T_INIT * run.total_steps) if self.t_init is None else self.t_init

    def end(self, run: TrainingInfo) -> int:
        """T − t_f, the step after which the budget is final."""
        t_final = round(T_FINAL * run.total_steps) if self.t_final is None else self.t_final
        return run.total_steps - t_final

    def check(self, run: TrainingInfo, method: str) -> None:
        """Raises ScheduleError, with ``method`` in the message, if the budget has no step of the run to fall in."""
        t_init, t_final = self.begin(run), run.total_steps - self.end(run)
        if t_init + t_final >= run.total_steps:
            raise ScheduleError(
                f"{method}(t_init={t_init}, t_final={t_final}) leaves no step in which the budget could fall, in a run "
                f"of {run.total_steps} steps: give smaller values, or train longer"
            )

    def _interval(self, run: TrainingInfo) -> int:
        return max(1, round(DELTA_T * run.total_steps)) if self.delta_t is None else self.delta_t


def epochs_to_steps(epochs: float, run: TrainingInfo, assumed_epochs: float) -> int:
    """A duration in epochs as optimiser steps, at least 1.

    If the length of an epoch is unknown, the run is assumed to last ``assumed_epochs`` epochs.
    """
    per_epoch = run.steps_per_epoch if run.steps_per_epoch is not None else run.total_steps / assumed_epochs
    return max(1, math.ceil(epochs * per_epoch - 1e-9))
