"""docs/extending.md is true: its method passes the suite, is found by name, and the names that it lists are there."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lorank
from lorank.testing import AllocatorConformance
from tests.distributions import install

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
METHOD, SCORER, SUITE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(ENTRY,) = re.findall(r"```toml\n.*?\n(.*?)```", PAGE, re.DOTALL)
(RECIPE,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's method, in the package that the page names."""
    folder = tmp_path_factory.mktemp("outside")
    name, value = (part.strip().strip('"') for part in ENTRY.split("="))
    package, module = value.partition(":")[0].split(".")
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / f"{module}.py").write_text(f"{METHOD}\n\n{SCORER}")
    install(folder, "my-package", {name: value})
    sys.path.insert(0, str(folder))
    yield importlib.import_module(f"{package}.{module}")
    sys.path.remove(str(folder))


class TestThePagesMethod(AllocatorConformance):
    @pytest.fixture(autouse=True)
    def _take(self, page: ModuleType) -> None:
        self.page = page

    def make(self, budget: Any = None) -> lorank.Allocator:
        method: lorank.Allocator = self.page.MagnitudePruning(budget=budget)
        return method


class TestThePagesScorer(AllocatorConformance):
    @pytest.fixture(autouse=True)
    def _take(self, page: ModuleType) -> None:
        self.page = page

    def make(self, budget: Any = None) -> lorank.Allocator:
        rounds: lorank.Allocator = self.page.MagnitudeRounds(
            k1=3, k2=3, rounds=3, unit="steps", per_round=5, budget=budget
        )
        return rounds


def test_the_page_s_own_suite_is_that_suite(page: ModuleType) -> None:
    names = dict(vars(page))
    exec(compile(SUITE, "docs/extending.md", "exec"), names)
    suite = names["TestMagnitudePruning"]
    assert issubclass(suite, AllocatorConformance)
    assert suite().make("8 ranks") == page.MagnitudePruning(budget="8 ranks")


def test_its_bad_settings_are_refused(page: ModuleType) -> None:
    with pytest.raises(
        lorank.ScheduleError, match=r"MagnitudePruning\(at=1.5\): expected a number above 0 and below 1"
    ):
        page.MagnitudePruning(at=1.5)


def test_a_recipe_names_it_and_a_run_attaches_it(page: ModuleType, tmp_path: Path) -> None:
    recipe = f"model: {{name: tiny}}\ntask: {{name: classification, data: x}}\noutput_dir: y\n{RECIPE}"
    (tmp_path / "recipe.yaml").write_text(recipe)
    code = f"""
import sys
sys.path.insert(0, {str(Path(str(page.__file__)).parents[1])!r})
from lorank.config import load_config
from lorank.testing import TINY_LLAMA, Loop
method = load_config("recipe.yaml", ["allocator.budget=31 ranks"]).allocator.build()
ranks = Loop(TINY_LLAMA, method, steps=4).run().ranks
print(type(method).__name__, method.at, [record.step for record in ranks.history.allocations], ranks.layers.total_rank)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "MagnitudePruning 0.5 [2] 31"


def test_the_names_that_the_page_lists_are_there() -> None:
    rows = re.findall(r"^\| `(lorank[\w.]*)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for module, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            value = getattr(importlib.import_module(module), name)
            if inspect.isfunction(value) or inspect.isclass(value):
                assert value.__doc__, name


def test_the_hooks_stand_in_the_order_in_which_a_run_calls_them() -> None:
    from lorank.testing.hooks import HOOKS

    assert tuple(re.findall(r"^\|[^|]*\| `(\w+)\([a-z, ]*\)` \|", PAGE, re.MULTILINE)) == HOOKS
