"""`lorank score` and `lorank prune`: commands for trained adapters, from lorank or from plain PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.cli.common import console, one_message, quiet_libraries
from lorank.experiments.adapter_folder import check_adapter, check_budget_given, check_choice, check_pruned_folder
from lorank.experiments.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.experiments.adapter_session import LoadedAdapter
    from lorank.experiments.posthoc import Pruned, Scored

KINDS = ("balanced", "ablation", "first_order", "screen", "saliency")
SHARE = 0.95
"""By balanced, the table says how many ranks hold this share of a module's worth."""
LOWEST = 4
"""How many of a module's lowest ranks the table lists."""

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
        "--task", help="classification, generation or language_modelling. [default: from the adapter and the data]"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base model: a hub name, a folder, tiny or minilm. [default: the model named in the adapter]"
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


def score(
    adapter: Adapter,
    overrides: Overrides = None,
    data: Data = None,
    task: Kind = None,
    model: Model = None,
    config: Config = None,
    by: By = "ablation",
    terms: Terms = "both",
    samples: Samples = 32,
    out: Annotated[Path | None, typer.Option(help="Also write every score to this JSON file.")] = None,
) -> None:
    """Score each rank of a trained adapter. Nothing is changed.

    Examples:

    `lorank score runs/e2e_alora`

    `lorank score my/adapter --data e2e_nlg --samples 64 --out scores.json`

    `lorank score my/adapter --data rows.jsonl --by saliency task.holdout=0.1 task.validation_split=null`
    """
    with one_message():
        _check(adapter, config, by, terms)
        from lorank.experiments import posthoc
        from lorank.files import write_text

        if out is not None:
            posthoc.check_scores_file(out)
        loaded = _load(adapter, data, task, model, config, overrides)
        with progress_bar() as report:
            scored = posthoc.score(
                loaded,
                by=by,  # type: ignore[arg-type]  # the function checks it
                terms=terms,  # type: ignore[arg-type]  # the same
                samples=samples,
                progress=report,
            )
        if out is not None:
            write_text(out, json.dumps(_as_json(loaded, scored), indent=2) + "\n")
        console().print(_scores_table(loaded, scored))
        if out is not None:
            console().print(f"written to {out}", markup=False)


def prune(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="The folder for the smaller adapter.")],
    overrides: Overrides = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="The budget of the smaller adapter: 50% (of this adapter's parameters), '0.32% of base' (of the base "
            "model's parameters), 8 (ranks per module on average), '120 ranks', 2M (parameters) or 8MB (file size)."
        ),
    ] = None,
    max_lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="The highest rank of any module (servers limit it). Works with --budget too."),
    ] = None,
    data: Data = None,
    task: Kind = None,
    model: Model = None,
    config: Config = None,
    by: By = "balanced",
    terms: Terms = "both",
    stages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="By balanced, the number of stages of the cut. Scores are measured anew before each. [default: 2]",
        ),
    ] = None,
    samples: Samples = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in --out.")] = False,
) -> None:
    """Make a smaller adapter from the best ranks of a trained adapter, without training.

    The new adapter is plain PEFT. The original adapter is not changed. Prints the loss before and after, on validation
    examples that were not used for scoring (on all examples if scoring used all of them).

    Examples:

    `lorank prune runs/e2e_alora --budget 50% --out smaller`

    `lorank prune my/adapter --data e2e_nlg --budget '0.32% of base' --out smaller`

    `lorank prune my/adapter --data e2e_nlg --max-lora-rank 16 --out for_vllm`
    """
    with one_message():
        _check(adapter, config, by, terms)
        check_pruned_folder(adapter, out, overwrite=overwrite)
        check_budget_given(budget, max_lora_rank)
        if stages is not None and by != "balanced":
            raise SettingsError(f"--stages {stages} is for --by balanced; --by {by} cuts at once: leave --stages out")
        from lorank.experiments import posthoc

        posthoc.check_out(adapter, out, overwrite=overwrite)
        posthoc.check_adapter(adapter)
        loaded = _load(adapter, data, task, model, config, overrides)
        wanted = posthoc.pruning_budget(loaded, budget, max_lora_rank)
        resolved = posthoc.check_budget(loaded, wanted)
        with progress_bar() as report:
            scored = posthoc.score(
                loaded,
                by=by,  # type: ignore[arg-type]  # the function checks it
                terms=terms,  # type: ignore[arg-type]  # the same
                samples=samples,
                budget=resolved,
                progress=report,
            )
            given = {} if stages is None else {"stages": stages}
            pruned = posthoc.prune(loaded, scored, wanted, out, overwrite=overwrite, progress=report, **given)
        console().print(_pruned_table(loaded, pruned))


def _check(adapter: Path, config: Path | None, by: str, terms: str) -> None:
    """Finds mistakes before the imports that take seconds."""
    check_adapter(adapter)
    check_choice("--by", by, KINDS)
    check_choice("--terms", terms, ("both", "without", "alone"))
    if config is not None:
        from lorank.config.recipes import find_file

        find_file(config)


def _load(
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
    from rich.progress import Progress

    errors = console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        job = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(job, completed=done, total=total)


def _as_json(loaded: LoadedAdapter, scored: Scored) -> dict[str, Any]:
    return {
        "adapter": str(loaded.adapter),
        "model": loaded.config.model.name,
        "data": loaded.config.task.data,
        "by": scored.by,
        "basis": "balanced" if scored.balanced else "as trained",
        "samples": scored.samples,
        "loss": scored.loss,
        "seconds": scored.seconds,
        "scores": {name: values.tolist() for name, values in scored.scores.items()},
    }


def _scores_table(loaded: LoadedAdapter, scored: Scored) -> Table:
    from rich.markup import escape
    from rich.table import Table

    balanced = scored.balanced
    table = Table(
        title=escape(str(loaded.adapter))
        + f": {loaded.layers.total_rank} ranks by {scored.by}, on {scored.samples} examples of "
        f"{escape(loaded.config.task.data)} (loss {scored.loss:.4f}), in {scored.seconds:.1f} s; higher = keep"
        + ("" if balanced is None else "; σ² in each module's balanced basis, not of the ranks as they were trained")
    )
    table.add_column("module", overflow="fold")
    for column in ("rank", "min", "mean", "max", "lowest ranks" if balanced is None else f"hold {SHARE:.0%}"):
        table.add_column(column, justify="right")
    for name, values in scored.scores.items():
        if not len(values):
            table.add_row(name, "0", "", "", "", "")
            continue
        numbers = [f"{value:.3g}" for value in (float(values.min()), float(values.mean()), float(values.max()))]
        if balanced is None:
            last = " ".join(map(str, values.argsort(stable=True)[:LOWEST].tolist()))
        else:  # in descending order, so the lowest are the last
            last = str(int((values.cumsum(0) < SHARE * values.sum()).sum()) + 1) if float(values.sum()) else "0"
        table.add_row(name, str(len(values)), *numbers, last)
    return table


def _pruned_table(loaded: LoadedAdapter, pruned: Pruned) -> Table:
    from rich.markup import escape
    from rich.table import Table

    before, after = (sum(pair[side] for pair in pruned.ranks.values()) for side in (0, 1))
    with_ranks = [sum(1 for pair in pruned.ranks.values() if pair[side]) for side in (0, 1)]
    highest = [max(pair[side] for pair in pruned.ranks.values()) for side in (0, 1)]
    table = Table(show_header=False)
    table.add_row("adapter", escape(str(loaded.adapter)))
    table.add_row("total rank", f"{before} → {after}")
    table.add_row("modules with ranks", f"{with_ranks[0]} → {with_ranks[1]}")
    table.add_row("highest rank", f"{highest[0]} → {highest[1]}")
    share = 100 * pruned.parameters[1] / pruned.parameters[0]
    table.add_row("parameters", f"{pruned.parameters[0]:,} → {pruned.parameters[1]:,} ({share:.1f} %)")
    table.add_row("validation loss", f"{pruned.loss[0]:.4f} → {pruned.loss[1]:.4f} ({pruned.examples} examples)")
    if pruned.predicted is not None:
        table.add_row("predicted increase", f"{pruned.predicted:.4g}")
    table.add_row("written to", escape(str(pruned.folder)))
    return table
