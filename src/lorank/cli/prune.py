"""`lorank prune`: smaller adapters from the best ranks of a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.cli.adapter_options import (
    Adapter,
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
from lorank.experiments.adapter_folder import check_budget_given, check_pruned_folder
from lorank.experiments.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.experiments.adapter_session import LoadedAdapter
    from lorank.experiments.posthoc import Pruned


def prune(
    adapter: Adapter,
    out: Annotated[
        Path, typer.Option(help="The folder for the smaller adapter; for several budgets, of a folder for each.")
    ],
    overrides: Overrides = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="The budget of the smaller adapter: '50% of adapter' (of this adapter's parameters; also 50%), '0.32% "
            "of base' (of the base model's parameters), 8 (ranks per module on average), '120 ranks', 2M (parameters) "
            "or 8MB (file size). Several: 75%,50%,25%, or the option several times; ranks are scored once."
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
    by: Annotated[
        str | None,
        typer.Option(
            help="The kind of score: balanced, ablation, first_order, screen or saliency; see `lorank score --help`. "
            "screen makes estimates, then evaluations until the ranks to prune are certain, for one budget. "
            "[default: balanced]"
        ),
    ] = None,
    terms: Terms = "both",
    scores: Annotated[
        Path | None,
        typer.Option(help="Use the scores in this file, of `lorank score --out`, in place of scoring anew."),
    ] = None,
    stages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="By balanced, the number of stages of the cut. Scores are measured anew before each. [default: 2]",
        ),
    ] = None,
    samples: Samples = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Make smaller adapters from the best ranks of a trained adapter, without training.

    The new adapter is plain PEFT. The original adapter is not changed. Prints the loss before and after, on validation
    examples that were not used for scoring (on all examples if scoring used all of them).

    Examples:

    `lorank prune runs/e2e_alora --budget 50% --out smaller`

    `lorank prune runs/e2e_alora --budget 75%,50%,25% --out smaller`

    `lorank prune my/adapter --data e2e_nlg --budget '0.32% of base' --out smaller`

    `lorank prune my/adapter --data e2e_nlg --max-lora-rank 16 --out for_vllm`

    `lorank prune my/adapter --data e2e_nlg --scores scores.json --budget 50% --out smaller`
    """
    with one_message(), json_output(as_json) as write_json:
        check_options(adapter, config, by, terms)
        specs = [part.strip() for given in budget or [] for part in given.split(",") if part.strip()]
        check_budget_given(specs[0] if specs else None, max_lora_rank)
        if len(specs) <= 1:
            check_pruned_folder(adapter, out, overwrite=overwrite)
        if scores is not None and by is not None:
            raise SettingsError(f"--scores {scores} says by what it scored: leave --by {by} out")
        if scores is not None and not scores.is_file():
            raise SettingsError(f"--scores {scores}: there is no such file. Make it: lorank score … --out {scores}")
        if len(specs) > 1 and by == "screen":
            raise SettingsError("--by screen scores for one budget: give one, or another --by")
        if stages is not None and by not in (None, "balanced"):
            raise SettingsError(f"--stages {stages} is for --by balanced; --by {by} cuts at once: leave --stages out")
        from lorank.experiments import posthoc
        from lorank.experiments.adapter_folder import budget_of_adapter
        from lorank.experiments.scores import score
        from lorank.experiments.scores_file import read_scores

        named = [budget_of_adapter(spec) for spec in specs]
        folders = [out] if len(named) <= 1 else posthoc.folders_of(out, named)
        for folder in folders:
            posthoc.check_out(adapter, folder, overwrite=overwrite)
        posthoc.check_adapter(adapter)
        loaded = load(adapter, data, task, model, config, overrides)
        wanted = [posthoc.pruning_budget(loaded, spec, max_lora_rank) for spec in (specs or (None,))]
        resolved = [posthoc.check_budget(loaded, one) for one in wanted]
        with progress_bar() as report:
            if scores is not None:
                scored = read_scores(scores, loaded)
                if stages is not None and scored.balanced is None:
                    raise SettingsError(f"--stages is for scores by balanced; {scores} has scores by {scored.by}")
            else:
                scored = score(
                    loaded,
                    by=by or "balanced",  # type: ignore[arg-type]  # the function checks it
                    terms=terms,  # type: ignore[arg-type]  # the same
                    samples=samples,
                    budget=resolved[0],
                    progress=report,
                )
            given: dict[str, Any] = {} if stages is None else {"stages": stages}
            done: list[Pruned] = []
            for one, folder in zip(wanted, folders, strict=True):
                loss = done[0].loss[0] if done else None
                pruned = posthoc.prune(
                    loaded, scored, one, folder, overwrite=overwrite, progress=report, loss=loss, **given
                )
                done.append(pruned)
        if as_json:
            write_json(_as_json(loaded, done))
        elif len(done) == 1:
            console().print(_one_table(loaded, done[0]))
        else:
            console().print(_table(loaded, done))
            for pruned in done:
                console(soft_wrap=True).print(f"written to {pruned.folder}", highlight=False, markup=False)


def _as_json(loaded: LoadedAdapter, done: Sequence[Pruned]) -> dict[str, Any]:
    return {
        "adapter": str(loaded.adapter),
        "parameters": done[0].parameters[0],
        "loss": done[0].loss[0],
        "examples": done[0].examples,
        "pruned": [
            {
                "budget": pruned.budget,
                "folder": str(pruned.folder),
                "parameters": pruned.parameters[1],
                "loss": pruned.loss[1],
                "predicted_increase": pruned.predicted,
                "ranks": {name: pair[1] for name, pair in pruned.ranks.items()},
            }
            for pruned in done
        ],
    }


def _one_table(loaded: LoadedAdapter, pruned: Pruned) -> Table:
    from rich.markup import escape
    from rich.table import Table

    before, after = (sum(pair[side] for pair in pruned.ranks.values()) for side in (0, 1))
    with_ranks = [sum(1 for pair in pruned.ranks.values() if pair[side]) for side in (0, 1)]
    highest = [max(pair[side] for pair in pruned.ranks.values()) for side in (0, 1)]
    table = Table(show_header=False)
    table.add_row("adapter", escape(str(loaded.adapter)))
    table.add_row("budget", pruned.budget)
    table.add_row("total rank", f"{before} → {after}")
    table.add_row("modules with ranks", f"{with_ranks[0]} → {with_ranks[1]}")
    table.add_row("highest rank", f"{highest[0]} → {highest[1]}")
    table.add_row("parameters", f"{pruned.parameters[0]:,} → {pruned.parameters[1]:,} ({_share(pruned)} % of adapter)")
    table.add_row("validation loss", f"{pruned.loss[0]:.4f} → {pruned.loss[1]:.4f} ({pruned.examples} examples)")
    if pruned.predicted is not None:
        table.add_row("predicted increase", f"{pruned.predicted:.4g}")
    table.add_row("written to", escape(str(pruned.folder)))
    return table


def _table(loaded: LoadedAdapter, done: Sequence[Pruned]) -> Table:
    """Loss against budget, one row for each."""
    from rich.markup import escape
    from rich.table import Table

    first = done[0]
    table = Table(title=f"{escape(str(loaded.adapter))}: loss on {first.examples} validation examples, after a cut")
    table.add_column("budget")
    for column in ("parameters", "% of adapter", "ranks", "highest", "loss", "increase", "predicted"):
        table.add_column(column, justify="right")
    whole = [pair[0] for pair in first.ranks.values()]
    table.add_row(
        "the whole adapter", f"{first.parameters[0]:,}", "100", str(sum(whole)), str(max(whole)), f"{first.loss[0]:.4f}"
    )
    for pruned in done:
        ranks = [pair[1] for pair in pruned.ranks.values()]
        table.add_row(
            pruned.budget,
            f"{pruned.parameters[1]:,}",
            _share(pruned),
            str(sum(ranks)),
            str(max(ranks)),
            f"{pruned.loss[1]:.4f}",
            f"{pruned.loss[1] - pruned.loss[0]:+.4f}",
            "" if pruned.predicted is None else f"{pruned.predicted:+.4f}",
        )
    return table


def _share(pruned: Pruned) -> str:
    return f"{100 * pruned.parameters[1] / pruned.parameters[0]:.1f}"
