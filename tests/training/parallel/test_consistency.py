"""Processes that hold the same pass, and a difference is named: by hashes of one bit, and by the first line."""

from __future__ import annotations

import pytest
import torch

from lorank.errors import DisagreementError
from lorank.training.parallel.consistency import digest, require_same_tensors, require_same_text
from lorank.training.parallel.process_group import ProcessGroup
from tests.training.parallel.threads import ThreadGroup, together


def test_a_hash_sees_one_bit_and_one_place() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    other[17] = torch.nextafter(other[17], torch.tensor(9.0))
    swapped = values.clone()
    swapped[[3, 4]] = values[[4, 3]]
    kinds = [values, other, swapped, values[:-1], -values, torch.zeros(3), torch.zeros(4), torch.tensor([])]
    assert len({int(digest(kind)) for kind in kinds}) == len(kinds)
    assert digest(values) == digest(values.clone().reshape(10, 100))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_hash_of_every_type(dtype: torch.dtype) -> None:
    assert digest(torch.tensor([0, 1], dtype=dtype)) != digest(torch.tensor([1, 0], dtype=dtype))


class TestText:
    def test_the_same_text_passes(self) -> None:
        assert together(lambda group: require_same_text(group, "rank: 4", "ranks", "Train alike")) == [None, None]

    @pytest.mark.parametrize(
        ("first", "second", "said"),
        [
            ("a: 1\nb: 2", "a: 1\nb: 3", "process 0 has 'b: 2', process 1 has 'b: 3'"),
            ("a: 1", "a: 1\nb: 3", "process 0 has 'nothing', process 1 has 'b: 3'"),
        ],
    )
    def test_all_processes_name_the_first_line_that_differs(self, first: str, second: str, said: str) -> None:
        errors = together(
            lambda group: require_same_text(group, (first, second)[group.index], "settings", "Use the same settings")
        )
        for error in errors:
            assert isinstance(error, DisagreementError)
            assert str(error) == f"the processes do not have the same settings: {said}. Use the same settings"


class TestTensors:
    def test_the_same_tensors_pass(self) -> None:
        def check(group: ThreadGroup) -> None:
            require_same_tensors(group, {"A": torch.ones(2, 3), "step": torch.tensor(1)}, "adapter", "Train alike")
            require_same_tensors(group, {}, "adapter", "Train alike")

        assert together(check) == [None, None]

    def test_a_bit_is_named_with_its_tensor(self) -> None:
        def check(group: ThreadGroup) -> None:
            tensors = {name: torch.ones(2, 3) for name in ("A", "B", "gates")}
            if group.index == 2:
                tensors["B"][1, 1] = tensors["gates"][0, 0] = 1 + 2**-23
            require_same_tensors(group, tensors, "adapter", "Train alike")

        for error in together(check, count=3):
            assert isinstance(error, DisagreementError)
            assert "B differs between process 2 and process 0 (2 of 3 tensors differ). Train alike" in str(error)

    def test_another_shape_is_named_before_hashes_are_compared(self) -> None:
        errors = together(
            lambda group: require_same_tensors(group, {"A": torch.ones(2 + group.index, 3)}, "adapter", "Train alike")
        )
        for error in errors:
            assert isinstance(error, DisagreementError)
            assert "process 0 has 'A: (2, 3) torch.float32', process 1 has 'A: (3, 3) torch.float32'" in str(error)


def test_one_process_compares_nothing() -> None:
    require_same_text(ProcessGroup(), "a: 1", "settings", "")
    require_same_tensors(ProcessGroup(), {"A": torch.ones(1)}, "adapter", "")
