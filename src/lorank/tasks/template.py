"""Templates: text made from the columns of a row. `"Review: {text}"` is filled from the column `text`.

Only plain column names are allowed in braces (`{{` and `}}` are literal braces). An attribute or an index would let a
configuration file reach into Python objects.
"""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from lorank.tasks.errors import DataError


def columns(template: str) -> tuple[str, ...]:
    """The names of the columns that a template reads, in order, without repetition.

    Raises:
        ValueError: the braces do not match, are empty, or hold something else than a column name.
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
            raise ValueError(f"{template!r}: write only the name of a column in braces")
        names[name] = None
    return tuple(names)


def checked(template: str) -> str:
    """Returns the template if it is well formed and reads at least one column; otherwise raises ValueError."""
    if not columns(template):
        raise ValueError(f"{template!r} reads no column: write a column's name in braces, as in '{{text}}'")
    return template


def require_columns(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Checks that a row has these columns and that none of them is empty.

    Raises:
        DataError: a column does not exist or is empty. The message lists the missing columns and the existing ones.
    """
    absent = [name for name in names if name not in row]
    if absent:
        wanted = ", ".join(repr(name) for name in absent)
        there = ", ".join(repr(name) for name in row)
        raise DataError(
            f"{where}: there is no column {wanted}. The columns are {there}. "
            f"Name one of them in the task's template, prompt, target or label."
        )
    empty = [name for name in names if row[name] is None]
    if empty:
        raise DataError(f"{where}: column {empty[0]!r} has no value in this row. Fill it in or remove the row: {row!r}")


def render(template: str, row: Mapping[str, Any], where: str) -> str:
    """Fills a template from a row. `where` names the row in the error that is raised if a column does not exist."""
    require_columns(row, columns(template), where)
    return template.format_map(row)
