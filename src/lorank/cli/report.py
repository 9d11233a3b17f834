"""`lorank report`: one HTML file about runs and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorank.cli.common import console, one_message, quiet_libraries
from lorank.experiments.errors import SettingsError
from lorank.experiments.report_sources import find_sources
from lorank.extras import require


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="Folders of `lorank train`, of the Trainer or any loop (with rank_history.jsonl), of "
            "`lorank compare`, or a folder of such folders.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The title of the page. [default: made from the runs]")] = "",
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write every figure as a PNG file into this folder.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write every figure as an SVG file into this folder.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the numbers of the report as JSON. Write no page unless --out is given."),
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out, also if it is no report of lorank.")
    ] = False,
    context: typer.Context = None,  # type: ignore[assignment]  # typer fills it in
) -> None:
    """Make one HTML file that shows what came out of runs: which ranks moved where, when, and what it cost.

    The file holds everything it needs: send it, or open it without a network. Several runs of one task are compared. A
    page that this command wrote before is replaced.

    Examples:

    `lorank report runs/e2e_balanced --open`

    `lorank report runs/e2e_lora runs/e2e_balanced --out compared.html`

    `lorank report runs/e2e_balanced --png figures`
    """
    with one_message():
        sources, comparisons = find_sources(runs)
        given = context.get_parameter_source("out") is not None and (
            context.get_parameter_source("out").name == "COMMANDLINE"  # type: ignore[union-attr]
        )
        page_wanted = given or show or not as_json
        for option, folder in (("--png", png), ("--svg", svg)):
            if folder is not None and folder.exists() and not folder.is_dir():
                raise SettingsError(f"{option} {folder} is a file: name a folder")
        if page_wanted or png or svg:
            require("lorank report", "altair", "vl_convert")
        from lorank.experiments import run_report

        if page_wanted:
            run_report.check_out(out, overwrite=overwrite)
        quiet_libraries(console(stderr=True))
        with console(stderr=True).status(f"Reading {len(sources) or len(comparisons)} folders"):
            found = run_report.read(sources, comparisons)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=2))
        written = []
        with console(stderr=True).status("Drawing"):
            if page_wanted:
                written.append(found.write_page(out, title=title))
            for folder, ending in ((png, ".png"), (svg, ".svg")):
                if folder is not None:
                    written += found.write_figures(folder, ending)
        told = console(stderr=as_json, soft_wrap=True)
        for path in written[:1] if page_wanted else ():
            told.print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False)
        for folder, ending in ((png, ".png"), (svg, ".svg")):
            if folder is not None:
                count = sum(path.suffix == ending for path in written)
                told.print(f"written to {folder}: {count} figures", markup=False, highlight=False)
        if show:
            typer.launch(out.resolve().as_uri())
