"""`lorank score`: what each rank of a trained adapter is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorank.cli.adapter_options import (
    Adapter,
    By,
    Config,
    Data,
    Kind,
    Model,
    Overrides,
    Samples,
    Terms,
    check_options,
    load,
    progress_bar,
)
from lorank.cli.common import Json, console, json_output, one_message
from lorank.experiments.time_left import duration

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from lorank.experiments.adapter_session import LoadedAdapter
    from lorank.experiments.scores import Scored

SHARE = 0.95
"""By balanced, the table says how many ranks hold this share of a module's worth."""
LOWEST = 4
"""How many of a module's lowest ranks the table lists."""
BALANCED = ", predicted; of each module's balanced basis, not of the ranks as they were trained"
ENDS = 10
"""How many modules the table lists from either end."""
LONG = 60
"""Scoring that may take more seconds than these says so before it begins."""


def score(
    adapter: Adapter,
    overrides: Overrides = None,
    data: Data = None,
    task: Kind = None,
    model: Model = None,
    config: Config = None,
    by: By = "first_order",
    terms: Terms = "both",
    samples: Samples = 32,
    out: Annotated[
        Path | None, typer.Option(help="Also write every score to this JSON file, for `lorank prune --scores`.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every module, not only the first and the last.")] = False,
    as_json: Json = False,
) -> None:
    """Say what each rank of a trained adapter is worth: what the loss rises by without it. Nothing is changed.

    The default is fast: estimates for all ranks from two backward passes. It says how long exact ablation would take.

    Examples:

    `lorank score runs/e2e_alora`

    `lorank score my/adapter --data e2e_nlg --samples 64 --out scores.json`

    `lorank score my/adapter --data e2e_nlg --by ablation`

    `lorank score my/adapter --data rows.jsonl --by saliency task.holdout=0.1 task.validation_split=null`
    """
    with one_message(), json_output(as_json) as write_json:
        check_options(adapter, config, by, terms)
        from lorank.experiments import scores, scores_file
        from lorank.files import write_text

        if out is not None:
            scores_file.check_scores_file(out)
        loaded = load(adapter, data, task, model, config, overrides)
        slow = None
        if by in ("ablation", "first_order"):
            slow = scores.slow_estimate(loaded, samples, terms)  # type: ignore[arg-type]  # checked above
            if by == "ablation" and slow.seconds > LONG:
                console(stderr=True).print(
                    f"{slow.evaluations} evaluations, up to {duration(slow.seconds)}; --by first_order takes seconds",
                    highlight=False,
                )
        with progress_bar() as report:
            scored = scores.score(
                loaded,
                by=by,  # type: ignore[arg-type]  # the function checks it
                terms=terms,  # type: ignore[arg-type]  # the same
                samples=samples,
                progress=report,
            )
        values = scores_file.scores_json(loaded, scored)
        if out is not None:
            write_text(out, scores_file.dump(values))
        if as_json:
            write_json(values)
            return
        output = console()
        output.print(_modules_table(loaded, scored, every=every))
        worth = _worth(scored)
        output.print(_projections_table(worth, scored))
        if by == "first_order" and slow is not None:
            output.print(
                f"estimated from gradients in {scored.seconds:.1f} s; exact ablation (--by ablation): "
                f"{slow.evaluations} evaluations, up to {duration(slow.seconds)}",
                highlight=False,
            )
        if out is not None:
            output.print(f"written to {out}", markup=False)


def _worth(scored: Scored) -> Mapping[str, Tensor]:
    """What the table shows of each rank: Δloss where it is known."""
    if scored.without is not None:
        return scored.without
    return scored.alone if scored.alone is not None else scored.scores


def _name_of_worth(scored: Scored) -> str:
    if scored.without is not None:
        return "Δloss"
    return "gain alone" if scored.alone is not None else scored.by


def _modules_table(loaded: LoadedAdapter, scored: Scored, *, every: bool) -> Table:
    from rich.markup import escape
    from rich.table import Table

    what, worth, balanced = _name_of_worth(scored), _worth(scored), scored.balanced is not None
    meaning = {
        "Δloss": "what the loss rises by without the rank",
        "gain alone": "what the rank alone takes off the base model's loss",
    }.get(what, "higher = keep")
    table = Table(
        title=escape(str(loaded.adapter))
        + f": {loaded.layers.total_rank} ranks by {scored.by} on {scored.samples} examples of "
        f"{escape(loaded.config.task.data)}, loss {scored.loss:.4f}, in {scored.seconds:.1f} s\n"
        f"{what}: {meaning}{BALANCED if balanced else ''}"
    )
    both = scored.without is not None and scored.alone is not None
    table.add_column("module", overflow="fold")
    columns = ["ranks", f"{what}, sum", "least", "most", *(["alone, sum"] if both else [])]
    for column in (*columns, f"ranks that hold {SHARE:.0%}" if balanced else "pruned first"):
        table.add_column(column, justify="right")
    ordered = sorted(worth, key=lambda name: -float(worth[name].sum()))
    shown = ordered if every or len(ordered) <= 2 * ENDS + 1 else [*ordered[:ENDS], "", *ordered[-ENDS:]]
    for name in shown:
        if not name:
            table.add_row(f"… {len(ordered) - 2 * ENDS} modules between: --all")
            continue
        values = worth[name]
        if not len(values):
            table.add_row(name, "0")
            continue
        numbers = [f"{float(value):.3g}" for value in (values.sum(), values.min(), values.max())]
        if both:
            assert scored.alone is not None
            numbers.append(f"{float(scored.alone[name].sum()):.3g}")
        if balanced:  # in descending order, so the lowest are the last
            last = str(int((values.cumsum(0) < SHARE * values.sum()).sum()) + 1) if float(values.sum()) else "0"
        else:
            last = " ".join(map(str, scored.scores[name].argsort(stable=True)[:LOWEST].tolist()))
        table.add_row(name, str(len(values)), *numbers, last)
    return table


def _projections_table(worth: Mapping[str, Tensor], scored: Scored) -> Table:
    from rich.table import Table

    from lorank.experiments.scores_file import projection_sums
    from lorank.training.summary import by_projection

    ranks = by_projection({name: {"rank": len(values)} for name, values in worth.items()})
    sums = projection_sums(worth)
    table = Table()
    table.add_column("projection")
    for column in ("ranks", f"{_name_of_worth(scored)}, sum", "per rank"):
        table.add_column(column, justify="right")
    for name, total in sums.items():
        count = ranks[name]["rank"]
        table.add_row(name, str(count), f"{total:.3g}", f"{total / count:.3g}" if count else "")
    return table
