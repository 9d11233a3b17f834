"""Optional packages. `pip install lorank` installs what training with moving ranks needs; an extra installs the
packages of one further part, such as the command line.

Code that needs an optional package calls :func:`require` first. So a missing package gives one clear line, before
anything slow begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

from lorank.errors import LorankError


class Package(NamedTuple):
    """The package that provides a module: its name for pip, and the lorank extra that installs it."""

    name: str
    extra: str


# torchao, deepspeed and trl are not listed: lorank uses them only if the user's model, optimiser or trainer was made
# with them. pyyaml and jinja2 are not listed either: transformers, peft and torch depend on them.
PACKAGES: Mapping[str, Package] = {
    "bitsandbytes": Package("bitsandbytes", "quantised"),
    "datasets": Package("datasets", "cli"),
    "omegaconf": Package("omegaconf", "cli"),
    "rich": Package("rich", "cli"),
    "typer": Package("typer", "cli"),
    "gguf": Package("gguf", "gguf"),
    "altair": Package("altair", "report"),
    "matplotlib": Package("matplotlib", "report"),
    "optuna": Package("optuna", "sweep"),
    "vl_convert": Package("vl-convert-python", "report"),
    "rouge_score": Package("rouge-score", "metrics"),
    "pyarrow": Package("pyarrow", "cli"),
    "sacrebleu": Package("sacrebleu", "metrics"),
    "sklearn": Package("scikit-learn", "images"),
    "scipy": Package("scipy", "metrics"),
}
"""The packages by the name under which they are imported."""


class MissingPackageError(LorankError, ImportError):
    """The code needs an optional package that is not installed. The message names the extra that installs it."""


def require(user: str, *modules: str) -> None:
    """Checks that optional modules can be imported, without importing them.

    Args:
        user: what needs the modules, for example "lorank train". The message begins with it.
        modules: names of modules, keys of `PACKAGES`.

    Raises:
        MissingPackageError: one or more modules are not installed. Example: `lorank train needs the package typer: pip
            install "lorank[cli]"`.
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
    except (ImportError, ValueError):  # a finder blocks the module, or the module has no specification
        return False
