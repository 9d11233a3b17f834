"""Entry point of the `lorank` command: without the extra `cli`, one line that says what to install."""

from __future__ import annotations

import sys

from lorank.extras import MissingPackageError, require


def main() -> None:
    """Runs the command line, if what it is made of is installed."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        require(f"lorank {command}".rstrip(), "typer", "rich", "omegaconf")
    except MissingPackageError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    from lorank.cli.app import app

    app()
