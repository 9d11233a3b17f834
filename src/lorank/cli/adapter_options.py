"""Options that the commands for trained adapters share, and what they do first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.cli.common import console, quiet_libraries
from lorank.experiments.adapter_folder import check_adapter, check_choice

if TYPE_CHECKING:
    from lorank.experiments.adapter_session import LoadedAdapter

KINDS = ("balanced", "ablation", "first_order", "screen", "saliency")

Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        help="The folder of any PEFT LoRA adapter (with adapter_config.json), or the output_dir of `lorank train`.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Further settings, as for `lorank train`: task.max_length=64."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="The data to score ranks on: a known data set (e2e_nlg, …), a path, or a hub name. Not needed with "
        "--config, nor for adapters of `lorank train`, which are scored on their own task."
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="classification, generation, language_modelling or image_classification. "
        "[default: from the adapter and the data]",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base model: a hub name, a folder, tiny, tiny_vit or minilm. [default: the model named in the adapter]"
    ),
]
Config = Annotated[Path | None, typer.Option(help="A configuration of `lorank train`, for model and task.")]
By = Annotated[
    str,
    typer.Option(
        help="The kind of score: balanced (second-order effects on the loss, in the basis in which ranks have a "
        "worth of their own; two backward passes per eight examples), ablation (AB-LoRA: the loss without each "
        "rank, and with each rank alone), first_order (estimates of ablation from two backward passes, for any number "
        "of ranks), screen (prune only: estimates, then evaluations until the ranks to prune are certain) or saliency "
        "(gradient magnitudes of small batches)."
    ),
]
Terms = Annotated[
    str,
    typer.Option(
        help="The terms of ablation, first_order or screen: both (as in the paper), without (loss without the rank) or "
        "alone (loss with the rank alone)."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Number of validation examples for scoring ranks.")]


def check_options(adapter: Path, config: Path | None, by: str | None, terms: str) -> None:
    """Finds mistakes before the imports that take seconds."""
    check_adapter(adapter)
    if by is not None:
        check_choice("--by", by, KINDS)
    check_choice("--terms", terms, ("both", "without", "alone"))
    if config is not None:
        from lorank.config.recipes import find_file

        find_file(config)


def load(
    adapter: Path,
    data: str | None,
    task: str | None,
    model: str | None,
    config: Path | None,
    overrides: list[str] | None,
) -> LoadedAdapter:
    from lorank.experiments.adapter_session import load_finished

    quiet_libraries(console(stderr=True))
    return load_finished(adapter, data=data, task=task, model=model, config=config, overrides=overrides or ())


@contextmanager
def progress_bar(what: str = "Scoring ranks") -> Iterator[Any]:
    """A progress bar, on a terminal only. It disappears at the end."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    errors = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(
        *columns, TimeRemainingColumn(), console=errors, transient=True, disable=not errors.is_terminal
    ) as bar:
        job = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(job, completed=done, total=total)
