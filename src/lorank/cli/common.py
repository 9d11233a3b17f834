"""Code that all commands share: consoles, errors as one message, fewer messages from other libraries."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.errors import LorankError

if TYPE_CHECKING:
    from rich.console import Console


Json = Annotated[
    bool, typer.Option("--json", help="Print JSON to standard output, for scripts, and nothing else there.")
]
"""The option that every command with results has."""


@contextmanager
def json_output(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Yields a function that prints values as JSON on standard output.

    Args:
        wanted: whether the command prints JSON. Then whatever else prints to standard output meanwhile, also other
            libraries, goes to standard error.
    """
    output = sys.stdout

    def write(values: Any) -> None:
        output.write(json.dumps(values, indent=2, ensure_ascii=False, default=_plain) + "\n")

    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield write


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A rich console on standard output or standard error."""
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=soft_wrap)


@contextmanager
def one_message(interrupted: str = "Nothing was written.") -> Iterator[None]:
    """Prints an expected error as one message and exits with status 2.

    Args:
        interrupted: printed after a keyboard interruption: what is left on disk and how to continue. The status is 130.
    """
    try:
        yield
    except (LorankError, OSError) as error:
        from rich.markup import escape

        errors = console(stderr=True, soft_wrap=True)
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console(stderr=True, soft_wrap=True).print(f"Interrupted. {interrupted}")
        raise typer.Exit(130) from None


def quiet_imports() -> None:
    """Hides warnings that libraries log while they are imported, about parts of them that lorank does not use."""
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries(notices: Console) -> None:
    """Shows lorank's own log messages above the progress bar, and other libraries' messages only if they are errors."""
    from rich.logging import RichHandler
    from transformers.utils import logging as transformers_logging

    # transformers' deprecation warnings concern developers, not users of the command line
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    library: Any = transformers_logging  # it has no annotations
    library.set_verbosity_error()
    library.disable_progress_bar()
    logger = logging.getLogger("lorank")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # some libraries add a handler to the root logger
    logger.handlers = [RichHandler(console=notices, show_path=False, show_level=False, show_time=False)]
