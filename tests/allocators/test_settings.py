"""Settings that are checked where they are declared: what is refused, how, and what a dataclass still does."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from lorank.allocators import AdaLoRA, ALoRA, ALoRASensi, ARDLoRA, Budget, SoRA
from lorank.allocators.settings import documented_settings, settings
from lorank.errors import BudgetError, LorankError, ScheduleError
from tests.methods import METHODS


@settings(raises=ScheduleError)
class Example:
    """An example.

    Args:
        size: how large it is,
            see :class:`~lorank.allocators.budget.Budget`. ≥ 1.
        kind: ``"a"`` or ``"b"``.

    Raises:
        ScheduleError: a setting is out of its range.
    """

    size: Annotated[int, Field(ge=1)]
    kind: Literal["a", "b"] = "a"
    share: Annotated[float | None, Field(gt=0, le=1)] = None
    names: dict[str, int] = dataclasses.field(default_factory=dict)
    on: bool = True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "Example(size=0): expected a whole number of at least 1"),
        ({"size": 2.5}, "Example(size=2.5): expected a whole number of at least 1"),
        ({"size": True}, "Example(size=True): expected a whole number of at least 1"),
        ({"size": "3"}, "Example(size='3'): expected a whole number of at least 1"),
        ({}, "Example(): size is missing, expected a whole number of at least 1"),
        ({"size": 1, "kind": "c"}, "Example(kind='c'): expected one of a, b"),
        ({"size": 1, "share": 1.5}, "Example(share=1.5): expected a number above 0 and at most 1, or None"),
        ({"size": 1, "share": float("nan")}, "Example(share=nan): expected a number above 0 and at most 1, or None"),
        ({"size": 1, "share": True}, "Example(share=True): expected a number above 0 and at most 1, or None"),
        ({"size": 1, "on": 1}, "Example(on=1): expected True or False"),
        ({"size": 1, "names": {"x": "y"}}, "Example(names.x='y'): expected a valid integer"),
        ({"size": 1, "kid": "a"}, "Example(kid='a'): unknown setting; did you mean kind?"),
        ({"size": 1, "zzz": 1}, "Example(zzz=1): unknown setting; expected one of size, kind, share, names, on"),
        (
            {"size": 0, "kin": 1},
            "2 settings of Example are wrong\n"
            "  Example(size=0): expected a whole number of at least 1\n"
            "  Example(kin=1): unknown setting; did you mean kind?",
        ),
    ],
)
def test_the_error_names_the_setting_its_value_and_what_is_expected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Example(**given)
    assert str(caught.value) == message


def test_settings_by_position() -> None:
    assert Example(2, "b") == Example(size=2, kind="b")
    with pytest.raises(ScheduleError, match=r"Example\(kind='c'\)"):
        Example(2, "c")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=r"Example\(…, 7\): expected at most 5 settings: size, kind"):
        Example(2, "b", 0.5, {}, True, 7)  # type: ignore[call-arg]


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(ScheduleError) as caught:
        Example(size="x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_a_condition_between_fields_may_raise_its_own_error() -> None:
    @settings(raises=BudgetError)
    class Pair:
        low: int
        high: int

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ScheduleError("low is above high")

    with pytest.raises(ScheduleError, match="low is above high"):
        Pair(2, 1)


def test_an_error_about_the_whole_object_names_the_class() -> None:
    @settings(raises=ScheduleError)
    class Odd:
        size: int

        def __post_init__(self) -> None:
            raise ValueError("never right")

    with pytest.raises(ScheduleError, match=r"^Odd: never right$"):
        Odd(1)


def test_the_signature_is_that_of_the_fields() -> None:
    assert list(inspect.signature(Example).parameters) == ["size", "kind", "share", "names", "on"]


def test_what_the_docstring_says_of_each_setting() -> None:
    assert documented_settings(Example) == {"size": "how large it is, see Budget. ≥ 1.", "kind": '`"a"` or `"b"`.'}


@pytest.mark.parametrize("make", [ALoRA, ALoRASensi, AdaLoRA, ARDLoRA, SoRA])
def test_every_setting_of_a_method_is_documented(make: Any) -> None:
    assert {field.name for field in dataclasses.fields(make)} <= documented_settings(make).keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ALoRA(rounds=2.5),  # type: ignore[arg-type]
        lambda: ALoRA(k1="fast"),  # type: ignore[arg-type]
        lambda: AdaLoRA(t_init=True),
        lambda: SoRA(l1="0.1"),  # type: ignore[arg-type]
        lambda: ARDLoRA(head_overrides={"q_proj": 4}),  # type: ignore[dict-item]
    ],
)
def test_wrong_types_are_refused(make: Any) -> None:
    with pytest.raises(ScheduleError, match="expected"):
        make()


def test_a_budget_that_is_the_only_mistake_is_a_budget_error() -> None:
    with pytest.raises(BudgetError, match="'8 apples': expected 8"):
        ALoRA(budget="8 apples")
    with pytest.raises(ScheduleError, match=r"2 settings of ALoRA are wrong\n.*k1=0.*\n.*8 apples"):
        ALoRA(k1=0, budget="8 apples")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [None, "3k params"])
def test_a_method_is_still_a_frozen_dataclass(name: str, budget: Any) -> None:
    method = METHODS[name].make(budget)
    assert copy.deepcopy(method) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert dataclasses.replace(method) == method
    assert dataclasses.replace(method, budget=7).budget == Budget(ranks_per_module=7)  # type: ignore[call-arg]
    assert json.loads(json.dumps(method.describe())) == method.describe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.budget = 3
    with pytest.raises(LorankError, match="unknown setting"):
        dataclasses.replace(method, size=3)
