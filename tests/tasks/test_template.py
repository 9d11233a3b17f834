"""Templates: which columns they read, what they refuse."""

import pytest

from lorank.tasks.errors import DataError
from lorank.tasks.template import checked, columns, render


def test_columns_in_order_each_once() -> None:
    assert columns("{b}: {a} and {b}, {{literally}}") == ("b", "a")


@pytest.mark.parametrize("template", ["{", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{0.x}"])
def test_anything_but_a_column_between_braces_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="braces"):
        columns(template)


def test_a_template_without_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="reads no column"):
        checked("text")


def test_rendering_keeps_braces_that_stand_in_the_data() -> None:
    assert render("<{text}>", {"text": "{x} {{y}}"}, "row") == "<{x} {{y}}>"


def test_an_absent_column_is_named_beside_those_that_are_there() -> None:
    with pytest.raises(DataError, match=r"(?s)no column 'txt'.*'text', 'label'.*Name one of them"):
        render("{txt}", {"text": "a", "label": 1}, "Data set 'x'")


def test_a_value_that_is_not_there_is_an_error_not_the_word_none() -> None:
    with pytest.raises(DataError, match="'text' has no value"):
        render("{text}", {"text": None}, "Data set 'x'")
