"""The package's front door."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import suppress

import pytest

import lorank
from lorank.lazy import no_garbage_collection


def test_every_public_name_is_there() -> None:
    for name in lorank.__all__:
        assert getattr(lorank, name) is not None
    assert set(lorank.__all__) == set(dir(lorank))
    assert set(lorank._HOMES) == set(lorank.__all__) - {"__version__"}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'AloRA'"):
        lorank.AloRA  # noqa: B018  # asking is the test


def test_importing_the_package_imports_neither_torch_nor_peft() -> None:
    code = (
        "import lorank, sys; lorank.__version__; sys.exit(bool({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_an_import_that_fails_leaves_garbage_collection_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with suppress(ImportError), no_garbage_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
