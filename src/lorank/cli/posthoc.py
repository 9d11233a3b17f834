"""`lorank score` and `lorank prune`: adapters that are already trained, by lorank or by plain PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.cli.common import console, one_message, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.experiments.adapter_session import LoadedAdapter
    from lorank.experiments.posthoc import Pruned, Scored

LOWEST = 4
"""How many of a module's lowest ranks the table lists."""

Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        help="A folder with adapter_config.json, trained anywhere, or the folder of a `lorank train`.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Further settings of a configuration, as for train: task.max_length=64."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="What to judge ranks by: a known data set (e2e_nlg, …), a path, or a hub name. Not needed with --config, "
        "nor for adapters of `lorank train`, which are judged on their own task."
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--task", help="classification, generation or language_modelling. [default: what adapter and data say]"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base model: a hub name, a folder, tiny or minilm. [default: the one that the adapter names]"
    ),
]
Config = Annotated[Path | None, typer.Option(help="A YAML file as for `lorank train`, for model and task.")]
By = Annotated[
    str,
    typer.Option(
        help="ablation (AB-LoRA: every rank is taken away, and left alone, once), first_order (two backward passes "
        "that estimate it, however many ranks there are), screen (prune only: estimates, then evaluations until it is "
        "settled which ranks go) or saliency (magnitudes of gradients of small batches)."
    ),
]
Terms = Annotated[
    str,
    typer.Option(
        help="Which terms of ablation, first_order or screen count: both (the paper's), without (the rank), or alone."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Validation examples that ranks are scored on.")]


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
    """Show what each rank of a finished adapter is worth. Nothing is changed.

    Examples:

    `lorank score runs/e2e_alora`

    `lorank score my/adapter --data e2e_nlg --samples 64 --out scores.json`

    `lorank score my/adapter --data rows.jsonl --by saliency task.holdout=0.1 task.validation_split=null`
    """
    with one_message():
        from lorank.experiments import posthoc
        from lorank.files import write_text

        opened = _open(adapter, data, task, model, config, overrides)
        with _progress() as report:
            scored = posthoc.score(opened, by=by, terms=terms, samples=samples, progress=report)  # type: ignore[arg-type]  # checked there
        if out is not None:
            write_text(out, json.dumps(_as_json(opened, scored), indent=2) + "\n")
        console().print(_scores_table(opened, scored))
        if out is not None:
            console().print(f"written to {out}")


def prune(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="The folder for the smaller adapter.")],
    overrides: Overrides = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What the smaller adapter may cost: 50% (of this adapter's own parameters), '0.32% of base' (of the "
            "base model's), 8 (ranks per module on average), '120 ranks', 2M (parameters) or 8MB (in the file)."
        ),
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="The highest rank of any module, as servers limit it; also with --budget.")
    ] = None,
    data: Data = None,
    task: Kind = None,
    model: Model = None,
    config: Config = None,
    by: By = "ablation",
    terms: Terms = "both",
    samples: Samples = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that --out holds.")] = False,
) -> None:
    """Make a smaller adapter of the best ranks of a finished one, without training.

    The new adapter is plain PEFT; the original stays. Prints the loss before and after on validation examples that
    ranks were not scored on (on all of them, where there are no others).

    Examples:

    `lorank prune runs/e2e_alora --budget 50% --out smaller`

    `lorank prune my/adapter --data e2e_nlg --budget '0.32% of base' --out smaller`

    `lorank prune my/adapter --data e2e_nlg --max-lora-rank 16 --out for_vllm`
    """
    with one_message():
        from lorank.experiments import posthoc

        posthoc.check_out(adapter, out, overwrite=overwrite)
        opened = _open(adapter, data, task, model, config, overrides)
        wanted = posthoc.pruning_budget(opened, budget, max_lora_rank)
        limits = posthoc.check_budget(opened, wanted)
        with _progress() as report:
            scored = posthoc.score(
                opened,
                by=by,  # type: ignore[arg-type]  # checked there
                terms=terms,  # type: ignore[arg-type]  # typer gives a str; checked by the scorer
                samples=samples,
                limits=limits,
                progress=report,
            )
        pruned = posthoc.prune(opened, scored, wanted, out, overwrite=overwrite)
        console().print(_pruned_table(opened, pruned))


def _open(
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
def _progress() -> Iterator[Any]:
    """A bar on a terminal, that disappears when done."""
    from rich.progress import Progress

    errors = console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        job = bar.add_task("Scoring ranks", total=None)
        yield lambda done, total: bar.update(job, completed=done, total=total)


def _as_json(opened: LoadedAdapter, scored: Scored) -> dict[str, Any]:
    return {
        "adapter": str(opened.adapter),
        "model": opened.config.model.name,
        "data": opened.config.task.data,
        "by": scored.by,
        "samples": scored.samples,
        "loss": scored.loss,
        "seconds": scored.seconds,
        "scores": {name: values.tolist() for name, values in scored.scores.items()},
    }


def _scores_table(opened: LoadedAdapter, scored: Scored) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{opened.adapter}: {opened.layers.total_rank} ranks by {scored.by}, on {scored.samples} examples of "
        f"{opened.config.task.data} (loss {scored.loss:.4f}), in {scored.seconds:.1f} s; higher = keep"
    )
    table.add_column("module", overflow="fold")
    for column in ("rank", "min", "mean", "max", "lowest ranks"):
        table.add_column(column, justify="right")
    for name, values in scored.scores.items():
        if not len(values):
            table.add_row(name, "0", "", "", "", "")
            continue
        numbers = [f"{value:.3g}" for value in (float(values.min()), float(values.mean()), float(values.max()))]
        lowest = values.argsort(stable=True)[:LOWEST].tolist()
        table.add_row(name, str(len(values)), *numbers, " ".join(map(str, lowest)))
    return table


def _pruned_table(opened: LoadedAdapter, pruned: Pruned) -> Table:
    from rich.table import Table

    before, after = (sum(pair[side] for pair in pruned.ranks.values()) for side in (0, 1))
    held = [sum(1 for pair in pruned.ranks.values() if pair[side]) for side in (0, 1)]
    highest = [max(pair[side] for pair in pruned.ranks.values()) for side in (0, 1)]
    table = Table(show_header=False)
    table.add_row("adapter", str(opened.adapter))
    table.add_row("ranks in all", f"{before} → {after}")
    table.add_row("modules with ranks", f"{held[0]} → {held[1]}")
    table.add_row("highest rank", f"{highest[0]} → {highest[1]}")
    share = 100 * pruned.parameters[1] / pruned.parameters[0]
    table.add_row("parameters", f"{pruned.parameters[0]:,} → {pruned.parameters[1]:,} ({share:.1f} %)")
    table.add_row("validation loss", f"{pruned.loss[0]:.4f} → {pruned.loss[1]:.4f} ({pruned.examples} examples)")
    table.add_row("written to", str(pruned.folder))
    return table
