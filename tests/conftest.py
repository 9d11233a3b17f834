from __future__ import annotations

import gc
import logging
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

from lorank.lora.kernels import onednn as onednn_kernels
from tests.one_more import is_one_more, stale

# The same examples in every run: a change that breaks nothing must not fail by the draw. Other examples, as many as
# wanted: pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True, deadline=None)  # a crowded machine must not fail a test
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run all cases of every kind (tests/one_more.py)")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays until the end: looking for garbage in it, again and again, takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out further cases of a kind, without ``--all``. A test that is asked for by its name is never left out."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and (unused := stale([item.nodeid for item in items])):
        raise pytest.UsageError(f"tests/one_more.py: no test has the name {unused[0]!r}")
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    more = [item for item in items if is_one_more(item.nodeid)]
    if more:
        config.hook.pytest_deselected(items=more)
        items[:] = [item for item in items if not is_one_more(item.nodeid)]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command line changes the logger's handlers, level and propagation; the next test starts without that."""
    logger = logging.getLogger("lorank")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    level, logger.propagate, logger.handlers = before
    logger.setLevel(level)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN's products, also where they gain nothing, also for tiny matrices."""
    monkeypatch.setenv("LORANK_ONEDNN", "1")
    monkeypatch.setattr(onednn_kernels, "_MIN_MULTIPLICATIONS", 0)
    onednn_kernels.onednn_linear.cache_clear()
    if onednn_kernels.onednn_linear() is None:
        pytest.skip("this PyTorch has no oneDNN product for float32")
    yield
    onednn_kernels.onednn_linear.cache_clear()
