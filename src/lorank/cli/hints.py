"""Hints for options that do not exist: what the user wrote as an option is often a setting, or an argument."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command that says how a setting is spelt that was given as an option: training.lr=1e-3."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        takes_settings = any(parameter.name == "overrides" for parameter in self.params)
        for option, value in _options(args):
            if option not in known and option not in ("--help", "-h"):
                hint = _hint(option, value, known, takes_settings, ctx.command_path)
                if hint:
                    raise typer.BadParameter(f"there is no option {option}. {hint}", ctx=ctx)
        return super().parse_args(ctx, args)


def _options(args: list[str]) -> Iterator[tuple[str, str | None]]:
    """The words that look like long options, each with its value or the word after it."""
    for index, word in enumerate(args):
        if word == "--":
            return
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            after = args[index + 1] if index + 1 < len(args) and not args[index + 1].startswith("-") else None
            yield option, value if equals else after


def _hint(option: str, value: str | None, known: set[str], takes_settings: bool, command: str) -> str | None:
    name = option.removeprefix("--").replace("-", "_")
    shown = "VALUE" if value is None else f"'{value}'" if any(c in value for c in ' {[*&;$|<>"') else value
    if near := get_close_matches(option.replace("_", "-"), [one for one in known if one.startswith("--")], 1, 0.8):
        return f"Did you mean {near[0]}?"
    if not takes_settings:
        return None
    if name in ("config", "recipe", "file", "config_file") and "--config" not in known:
        return f"The configuration is the first argument: {command} {'CONFIG' if value is None else shown}"
    key = _setting(name)
    if key is not None:
        return f"Settings are written without dashes: {key}={shown}"
    return "Settings are written without dashes: training.lr=1e-3" if "." in name else None


def _setting(name: str) -> str | None:
    """The dotted key of a setting that is called ``name`` in lorank, transformers or PEFT; None: there is none."""
    from lorank.config.errors import known_key
    from lorank.config.sections import RunSections

    return known_key(name, RunSections)
