"""`lorank export`: a trained adapter in the form that a program reads; where it loads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorank.cli.common import Json, console, json_output, one_message, quiet_libraries
from lorank.experiments.adapter_folder import adapter_of_run, check_adapter, check_choice, check_pruned_folder
from lorank.experiments.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from lorank.lora.export import Exported, Place

FORMS = ("peft", "tight", "uniform", "merged", "diffusers", "comfyui", "gguf", "mlx")


def export(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="The folder of any PEFT LoRA adapter (with adapter_config.json), or the output_dir of `lorank train`.",
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option(
            help="peft (as lorank saves it), tight (rank_pattern only: new vLLM, TensorRT-LLM), uniform (one rank, "
            "padded with zeros: SGLang, old vLLM, TGI, LoRAX), gguf (llama.cpp, Ollama), mlx (MLX-LM), diffusers, "
            "comfyui, or merged (the whole model: everything else)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for the result.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing. Print where this adapter loads, and what it costs there.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="The base model: a folder or a hub name. [default: the model named in the adapter]"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="With uniform or mlx, the rank of all modules. [default: the lowest that will do]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16. [default: the adapter's own; float32 where it would have to be rounded]"
        ),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            help="With diffusers or comfyui, the part of the pipeline: unet, transformer, text_encoder or "
            "text_encoder_2. [default: by the names of the modules]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write a trained adapter in the form that a program reads, with the same outputs. The original stays as it is.

    What was written is read again and compared with the original. Where a form cannot hold the adapter, the message
    names one that can.

    Examples:

    `lorank export runs/e2e_alora --check`

    `lorank export runs/e2e_alora --form gguf --out for_llama`

    `lorank export my/adapter --form uniform --out for_sglang`

    `lorank export my/adapter --form merged --out model`
    """
    with one_message(), json_output(as_json) as write_json:
        _check_options(adapter, form, out, check=check, overwrite=overwrite)
        if dtype is not None:
            check_choice("--dtype", dtype, ("float32", "float16", "bfloat16"))
        folder = adapter_of_run(adapter)
        from lorank.lora.export import export_adapter, places

        quiet_libraries(console(stderr=True))
        if check:
            found = places(folder, base)
            if as_json:
                write_json({"adapter": adapter, "places": [asdict(one) for one in found]})
            else:
                console().print(_places(adapter, found))
                _print_reasons(adapter, found)
            return
        assert form is not None  # checked above
        assert out is not None
        done = export_adapter(
            folder, out, form, base=base, rank=rank, dtype=dtype, component=component, overwrite=overwrite
        )
        if as_json:
            write_json({"adapter": adapter, **asdict(done)})
        else:
            console().print(_exported(adapter, done))
            for note in done.notes:
                console(stderr=True, soft_wrap=True).print(f"Note: {note}", highlight=False, markup=False)


def _check_options(adapter: Path, form: str | None, out: Path | None, *, check: bool, overwrite: bool) -> None:
    check_adapter(adapter)
    if check:
        given = "--form" if form is not None else "--out" if out is not None else None
        if given:
            raise SettingsError(f"--check writes nothing: leave {given} out, or leave --check out")
        return
    if form is None:
        raise SettingsError(
            f"give a form: --form {', '.join(FORMS)}. Which one a program reads: lorank export {adapter} --check"
        )
    check_choice("--form", form, FORMS)
    if out is None:
        raise SettingsError("give a folder for the result: --out for_server")
    check_pruned_folder(adapter, out, overwrite=overwrite)


def _exported(adapter: Path, done: Exported) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("adapter", escape(str(adapter)))
    table.add_row("form", done.form)
    if done.ranks:
        before, after = ([pair[side] for pair in done.ranks.values()] for side in (0, 1))
        filled = sum(1 for old, new in done.ranks.values() if new and not old)
        table.add_row(
            "total rank", f"{sum(before)} → {sum(after)}" + (f" ({filled} modules of zeros)" if filled else "")
        )
    table.add_row("size", f"{_megabytes(done.bytes)} ({done.dtype})")
    what = "output of a module" if done.form == "merged" else "module's update"
    table.add_row(f"largest difference of a {what}", f"{done.difference:.1e} of it")
    table.add_row("written to", escape(str(done.folder)))
    table.add_row("files", escape(", ".join(done.files)))
    return table


def _places(adapter: Path, found: Sequence[Place]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Where {escape(str(adapter))} loads")
    table.add_column("program")
    table.add_column("as it is")
    table.add_column("--form")
    for column in ("A and B", "padding"):
        table.add_column(column, justify="right")
    for place in found:
        size = "the whole model" if place.form == "merged" else "" if place.bytes is None else _megabytes(place.bytes)
        padding = "" if place.padding is None else f"× {place.padding:.2f}"
        table.add_row(place.program, "yes" if place.as_it_is else "no", place.form or "", size, padding)
    return table


def _print_reasons(adapter: Path, found: Sequence[Place]) -> None:
    """Why not as it is, and why not in a cheaper form: programs with the same reasons together."""
    reasons: dict[tuple[str, ...], list[str]] = {}
    for place in found:
        why = tuple(reason for reason in (place.why_not, *place.problems) if reason)
        if why:
            reasons.setdefault(why, []).append(place.program)
    lines = console(soft_wrap=True)
    for why, programs in reasons.items():
        lines.print(f"{', '.join(programs)}: {'; '.join(why)}", highlight=False, markup=False)
    forms = [place.form for place in found if place.form]
    if forms:
        lines.print(f"Write one: lorank export {adapter} --form {forms[0]} --out FOLDER", highlight=False, markup=False)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
