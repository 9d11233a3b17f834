"""`lorank init`: a recipe of the user's own, from three answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorank.cli.common import console, one_message
from lorank.experiments.adapter_folder import check_choice
from lorank.experiments.errors import SettingsError

KINDS = ("classification", "generation", "language_modelling", "image_classification")
COLUMNS = {
    "classification": (
        'template: "{text}"     # column names in braces',
        "label: label           # the column of the label",
    ),
    "generation": (
        'prompt: "{prompt}\\n"   # column names in braces',
        'target: "{target}"     # the text to generate',
    ),
    "language_modelling": (
        'template: "{text}"     # column names in braces',
        "block_size: 256        # tokens per block",
    ),
}

TEMPLATE = """\
# Written by lorank init.
#   lorank train {file} --dry-run      checks it, and says how long it takes
#   lorank train {file}
# Every key and its default: lorank schema, and docs/recipes.md
model:
  name: {model}

lora:
  r: 8                   # the rank of every module as the adapter is made
  alpha: 16
  target_modules: all-linear

task:
  name: {kind}
  data: {data}
{columns}
allocator:
  name: balanced         # begins wide, and cuts to the budget in the first third of the run
  budget: {budget}

training:
  epochs: 3
  batch_size: 16
  lr: 1.0e-3             # the most important number: try 3.0e-4 and 3.0e-3 too
  eval_steps: 100

output_dir: {output}
"""


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[
        str | None, typer.Option(help="The base model: a hub name, a folder, tiny, tiny_vit or minilm. [asked for]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The data: a known name (e2e_nlg, …), a path, or a hub name (owner/name). [asked for]"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="The size of the result: 100% of adapter, 0.32% of base, 8, '120 ranks', 2M, 8MB. [asked for]"
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}. [default: what fits the data]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Write a recipe for `lorank train`, with comments. Asks for model, data and budget, or takes them as options.

    Examples:

    `lorank init`

    `lorank init mine.yaml --model tiny --data python_reference --budget '100% of adapter'`
    """
    with one_message():
        if file.exists() and not force:
            raise SettingsError(f"{file} exists: name another file, or replace it (--force)")
        if task is not None:
            check_choice("--task", task, KINDS)
        model = _answer(model, "--model", "Base model (hub name, folder, tiny, minilm)", "tiny")
        data = _answer(data, "--data", "Data (e2e_nlg, clinc150, python_reference, path, owner/name)", "e2e_nlg")
        budget = _answer(budget, "--budget", "Budget ('100% of adapter', '0.32% of base', 8, 2M)", "100% of adapter")
        kind = task or _kind(data)
        text = TEMPLATE.format(
            file=file,
            model=_yaml(model),
            kind=kind,
            data=_yaml(data),
            columns=_columns(kind, data),
            budget=_yaml(_budget(budget)),
            output=_yaml(f"runs/{file.stem}"),
        )
        _check(text, file)
        from lorank.files import write_text

        write_text(file, text)
        output = console(soft_wrap=True)
        output.print(f"written to {file}. Next: lorank train {file} --dry-run", highlight=False, markup=False)


def _answer(given: str | None, option: str, question: str, default: str) -> str:
    if given is not None:
        return given
    if not _on_terminal():
        raise SettingsError(f"{option} is missing, and there is no terminal to ask on: give {option}")
    answer: str = typer.prompt(question, default=default)
    return answer.strip()


def _on_terminal() -> bool:
    return sys.stdin.isatty()


def _kind(data: str) -> str:
    from lorank.tasks.known import KNOWN, nearest_name

    if near := nearest_name(data):
        raise SettingsError(f"--data {data!r} is no known data set; did you mean {near}?")
    if data in KNOWN:
        return KNOWN[data].task
    raise SettingsError(f"--data {data!r} is of no known kind: give --task, one of {', '.join(KINDS)}")


def _columns(kind: str, data: str) -> str:
    """The lines about columns and splits, which known data sets need not have."""
    from lorank.tasks.known import KNOWN

    if data in KNOWN or kind == "image_classification":
        return ""
    return (
        "".join(f"  {line}\n" for line in COLUMNS[kind])
        + "  holdout: 0.1           # a tenth of the training split, for evaluation; or validation_split: validation\n"
        "  test_split: null       # the split for the report at the end\n"
    )


def _budget(text: str) -> str | float:
    from lorank.allocators import Budget

    Budget.parse(text)
    if text.isdecimal():
        return int(text)
    return float(text) if text.replace(".", "", 1).isdecimal() else text


def _check(text: str, file: Path) -> None:
    """Checks the recipe as `lorank train` does, before it is written: relative paths start from its folder."""
    from lorank.config.recipes import with_absolute_paths
    from lorank.config.settings import make_config
    from lorank.config.yaml_files import parse_yaml

    make_config(with_absolute_paths(parse_yaml(text), file.parent), source=str(file))


def _yaml(value: str | float) -> str:
    import yaml

    return yaml.safe_dump(value, allow_unicode=True, width=1000).removesuffix("\n").removesuffix("...").strip()
