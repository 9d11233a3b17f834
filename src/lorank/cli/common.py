"""What every command shares: errors as one message, and libraries that keep quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from lorank.errors import LorankError

_errors = Console(stderr=True, soft_wrap=True)


@contextmanager
def one_message(interrupted: str = "Nothing was written.") -> Iterator[None]:
    """Expected errors become one message and status 2; an interruption says what is left and how to go on."""
    try:
        yield
    except (LorankError, OSError) as error:
        _errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        _errors.print(f"Interrupted. {interrupted}")
        raise typer.Exit(130) from None


def quiet_libraries(console: Console) -> None:
    """lorank's own notices above the progress bar; other libraries only when something is wrong."""
    from transformers.utils import logging as transformers_logging

    # its deprecation warnings speak to those who call it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    library: Any = transformers_logging  # without annotations
    library.set_verbosity_error()
    library.disable_progress_bar()
    logger = logging.getLogger("lorank")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # some libraries give the root logger a handler of its own
    logger.handlers = [RichHandler(console=console, show_path=False, show_level=False, show_time=False)]
