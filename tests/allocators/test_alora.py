"""ALoRA's schedule and its settings."""

from __future__ import annotations

import pytest

from lorank.allocators import ALoRA, Run
from lorank.errors import ScheduleError
from lorank.lora import find_layers
from tests.models import adapted, tiny_llama


class TestSchedule:
    def test_the_papers_defaults(self) -> None:
        """K1 = 1 epoch, K2 = 0.25 epoch, at most 8 rounds."""
        schedule = ALoRA().schedule(Run(total_steps=1000, steps_per_epoch=100))
        assert schedule == [100, 125, 150, 175, 200, 225, 250, 275]

    def test_rounds_at_or_after_the_last_step_are_left_out(self) -> None:
        assert ALoRA().schedule(Run(total_steps=175, steps_per_epoch=100)) == [100, 125, 150]

    def test_without_epochs_the_run_counts_as_ten(self) -> None:
        assert ALoRA(rounds=2).schedule(Run(total_steps=1000)) == [100, 125]

    def test_steps(self) -> None:
        assert ALoRA(k1=7, k2=3, rounds=3, unit="steps").schedule(Run(total_steps=100)) == [7, 10, 13]

    def test_an_epoch_shorter_than_four_steps_allocates_at_most_once_a_step(self) -> None:
        assert ALoRA(rounds=3).schedule(Run(total_steps=100, steps_per_epoch=2)) == [2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k1": 0}, "both must be above 0"),
        ({"k2": -1.0}, "both must be above 0"),
        ({"rounds": 0}, "For plain LoRA use StaticLoRA"),
        ({"per_round": 0}, "per_round=0"),
        ({"unit": "hours"}, r"unit='hours'\): expected one of epochs, steps"),
        ({"terms": "neither"}, "expected one of both, without, alone"),
        ({"engine": "magic"}, "expected one of exact, reference"),
    ],
)
def test_settings_out_of_range(settings, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        ALoRA(**settings)


def test_pruning_everything_is_refused_before_training() -> None:
    layers = find_layers(adapted(tiny_llama(), r=1))
    with pytest.raises(ScheduleError, match=r"would prune n_A = 14 ranks .* have 14 in all"):
        ALoRA().start(layers, Run(total_steps=10))
    assert ALoRA(per_round=13).start(layers, Run(total_steps=10)) == {}
