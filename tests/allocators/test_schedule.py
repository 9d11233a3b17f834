"""When ranks move: rounds, and AdaLoRA's cubic fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorank.allocators import TrainingInfo
from lorank.allocators.schedule import CubicSchedule, RoundSchedule, epochs_to_steps
from lorank.errors import ScheduleError


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 9), st.integers(1, 80))
def test_the_last_round_is_the_last_one_that_is_due(k1: int, k2: int, rounds: int, steps: int) -> None:
    schedule, run = RoundSchedule(k1, k2, rounds, "steps"), TrainingInfo(steps)
    due = [step for step in range(1, steps + 1) if schedule.due(step, run)]
    assert schedule.last(run) == max(due, default=0)
    assert due == [k1 + i * k2 for i in range(rounds) if k1 + i * k2 < steps]


def test_epochs_are_rounded_up_to_whole_steps() -> None:
    assert epochs_to_steps(0.25, TrainingInfo(100, steps_per_epoch=10), 10) == 3
    assert epochs_to_steps(0.3, TrainingInfo(100, steps_per_epoch=10), 10) == 3  # not 4: 0.3 · 10 is not quite 3
    assert epochs_to_steps(0.001, TrainingInfo(100, steps_per_epoch=10), 10) == 1
    assert epochs_to_steps(2, TrainingInfo(100), 10) == 20


class TestCubicSchedule:
    def test_the_budget_falls_as_a_cube(self) -> None:
        run, schedule = TrainingInfo(100), CubicSchedule(10, 30, 5)
        assert [schedule.fraction(step, run) for step in (1, 10, 70, 99)] == [1, 1, 0, 0]
        assert schedule.fraction(40, run) == pytest.approx(0.125)

    @given(st.integers(3, 400))
    def test_the_end_is_always_due_and_nothing_comes_after_it(self, steps: int) -> None:
        run, schedule = TrainingInfo(steps), CubicSchedule(None, None, None)
        due = [step for step in range(1, steps + 1) if schedule.due(step, run)]
        assert due[-1] == schedule.end(run)
        assert due[0] > schedule.begin(run)

    def test_phases_that_leave_no_room(self) -> None:
        CubicSchedule(6, 3, 1).check(TrainingInfo(10), "AdaLoRA")
        with pytest.raises(ScheduleError, match=r"AdaLoRA\(t_init=6, t_final=4\) leaves no step .* a run of 10 steps"):
            CubicSchedule(6, 4, 1).check(TrainingInfo(10), "AdaLoRA")
