"""What every command shares: errors as one message, and libraries that keep quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from lorank.errors import LorankError

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A rich console on standard output or standard error."""
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=soft_wrap)


@contextmanager
def one_message(interrupted: str = "Nothing was written.") -> Iterator[None]:
    """Expected errors become one message and status 2; an interruption says what is left and how to go on."""
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


def quiet_libraries(notices: Console) -> None:
    """lorank's own notices above the progress bar; other libraries only when something is wrong."""
    from rich.logging import RichHandler
    from transformers.utils import logging as transformers_logging

    # its deprecation warnings speak to those who call it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    library: Any = transformers_logging  # without annotations
    library.set_verbosity_error()
    library.disable_progress_bar()
    logger = logging.getLogger("lorank")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # some libraries give the root logger a handler of its own
    logger.handlers = [RichHandler(console=notices, show_path=False, show_level=False, show_time=False)]
