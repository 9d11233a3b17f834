"""Text made from the columns of a row: `"Review: {text}"` is filled from the column `text`.

Only plain column names may stand between the braces (`{{` and `}}` are literal braces): an attribute or an index would
let a configuration file reach into Python objects.
"""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from lorank.tasks.errors import DataError


def columns(template: str) -> tuple[str, ...]:
    """Names of the columns that a template reads, in order, each once.

    Raises:
        ValueError: the braces do not match, are empty, or hold more than a column's name.
    """
    names: dict[str, None] = {}
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: braces do not match ({error}); a literal brace is written twice") from error
    for _, name, spec, conversion in fields:
        if name is None:
            continue
        if not name or spec or conversion or any(sign in name for sign in ".["):
            raise ValueError(f"{template!r}: between braces stands the name of a column and nothing else")
        names[name] = None
    return tuple(names)


def checked(template: str) -> str:
    """The template itself, if it is well formed and reads at least one column; ValueError otherwise."""
    if not columns(template):
        raise ValueError(f"{template!r} reads no column: write a column's name between braces, as in '{{text}}'")
    return template


def require_columns(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Check that a row has these columns and that none is empty.

    Raises:
        DataError: naming the columns that are not there and those that are.
    """
    absent = [name for name in names if name not in row]
    if absent:
        wanted = ", ".join(repr(name) for name in absent)
        there = ", ".join(repr(name) for name in row)
        raise DataError(
            f"{where}: there is no column {wanted}. Its columns are {there}. "
            f"Name one of them in the task's template, prompt, target or label."
        )
    empty = [name for name in names if row[name] is None]
    if empty:
        raise DataError(
            f"{where}: column {empty[0]!r} has no value in this row. Fill it in or leave the row out: {row!r}"
        )


def render(template: str, row: Mapping[str, Any], where: str) -> str:
    """Fill a template from a row; `where` names the row in the error raised if a column is not there."""
    require_columns(row, columns(template), where)
    return template.format_map(row)
