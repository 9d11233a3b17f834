"""Packages that only parts of lorank need: `pip install lorank` brings what training with moving ranks takes, an extra
the rest of one part.

What needs such a package asks for it first, by :func:`require`, so that a missing one is told in one line and before
anything slow begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

from lorank.errors import LorankError


class Package(NamedTuple):
    """Where a module comes from: the package's name for pip, and the extra of lorank's that brings it."""

    name: str
    extra: str


# bitsandbytes, torchao, deepspeed and trl are not here: lorank meets them only in models, optimisers and trainers that
# were made by them. Nor is pyyaml, which transformers and peft cannot do without.
PACKAGES: Mapping[str, Package] = {
    "datasets": Package("datasets", "cli"),
    "omegaconf": Package("omegaconf", "cli"),
    "rich": Package("rich", "cli"),
    "typer": Package("typer", "cli"),
    "matplotlib": Package("matplotlib", "report"),
    "rouge_score": Package("rouge-score", "metrics"),
    "sacrebleu": Package("sacrebleu", "metrics"),
    "scipy": Package("scipy", "metrics"),
}
"""By the name under which it is imported."""


class MissingPackageError(LorankError, ImportError):
    """A part of lorank was used whose extra is not installed; the message names the extra."""


def require(user: str, *modules: str) -> None:
    """Checks that modules can be imported, without importing them.

    Args:
        user: what needs them, the beginning of the message: "lorank train".
        modules: names from `PACKAGES`.

    Raises:
        MissingPackageError: one or more are not installed: `lorank train needs the package typer: pip install
            "lorank[cli]"`.
    """
    missing = [PACKAGES[module] for module in modules if not _is_installed(module)]
    if missing:
        names = " and ".join(package.name for package in missing)
        extras = ",".join(dict.fromkeys(package.extra for package in missing))
        raise MissingPackageError(
            f'{user} needs the package{"s" if len(missing) > 1 else ""} {names}: pip install "lorank[{extras}]"'
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a finder that blocks it, a module without a specification
        return False
