"""Entry point of the `lorank` command. Without the extra `cli`, it prints one line that names what to install."""

from __future__ import annotations

import sys

from lorank.extras import MissingPackageError, require


def main() -> None:
    """Runs the command line if its packages are installed; otherwise prints an error and exits with status 2."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        require(f"lorank {command}".rstrip(), "typer", "rich", "omegaconf")
    except MissingPackageError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    from lorank.cli.app import app

    app()
