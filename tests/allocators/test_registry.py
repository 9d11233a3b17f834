"""Methods of other packages: found by their entry points, usable in recipes, and harmless where they are broken."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import lorank
from lorank.allocators import find_allocators
from lorank.allocators.registry import OWN
from tests.distributions import install

METHOD = """
from dataclasses import dataclass
import lorank

@dataclass(frozen=True)
class Nothing(lorank.Allocator):
    strength: float = 0.5
    def allocate(self, context, state):
        return None

class Inherits(Nothing):
    pass

@dataclass
class Thawed(lorank.Allocator):
    def allocate(self, context, state):
        return None

@dataclass(frozen=True)
class Abstract(lorank.Allocator):
    pass

@dataclass(frozen=True)
class Named(Nothing):
    name: str = "mine"

@dataclass(frozen=True)
class Unspeakable(Nothing):
    module: lorank.Ranks | None = None

def function(): ...
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of modules, where packages can be installed."""
    (tmp_path / "outside_methods.py").write_text(METHOD)
    (tmp_path / "outside_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "outside_exit.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("outside_methods", "outside_broken", "outside_exit"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_own_methods_are_there_by_the_names_of_recipes() -> None:
    classes = find_allocators().classes
    assert list(classes)[: len(OWN)] == [
        "static",
        "balanced",
        "alora",
        "alora_dnas",
        "alora_sensi",
        "ard",
        "adalora",
        "sora",
    ]
    assert classes["alora_dnas"] is lorank.ALoRADNAS


def test_a_package_s_method_is_found(outside: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(outside, "outside", {"nothing": "outside_methods:Nothing"})
    registry = find_allocators()
    assert registry.classes["nothing"]().describe() == {"method": "Nothing", "strength": 0.5}
    assert "nothing" not in registry.refused
    assert "outside" not in caplog.text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("outside_broken:Nothing", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("outside_exit:Nothing", "SystemExit: 3"),
        ("outside_methods:Missing", "AttributeError: module 'outside_methods' has no attribute 'Missing'"),
        ("outside_methods:function", "is not a class derived from lorank.Allocator"),
        ("outside_methods:dataclass", "is not a class derived from lorank.Allocator"),
        ("outside_methods:Abstract", "is abstract: it must define allocate"),
        ("outside_methods:Inherits", "is not a frozen dataclass: decorate the class with @dataclass(frozen=True)"),
        ("outside_methods:Thawed", "is not a frozen dataclass"),
    ],
)
def test_a_method_that_cannot_be_used_is_reported_and_breaks_no_other(
    value: str, reason: str, outside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(outside, "good", {"nothing": "outside_methods:Nothing"})
    install(outside, "bad", {"broken": value})
    registry = find_allocators()
    assert {"alora", "nothing"} <= set(registry.classes)
    assert "broken" not in registry.classes
    assert reason in registry.refused["broken"]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("the method 'broken' of bad is left out: ")
    assert reason in record.getMessage()


@pytest.mark.parametrize("name", ["alora", "full"])
def test_a_name_of_lorank_s_own_keeps_its_meaning(name: str, outside: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(outside, "bold", {name: "outside_methods:Nothing"})
    registry = find_allocators()
    assert registry.classes["alora"] is lorank.ALoRA
    assert "full" not in registry.classes
    assert name not in registry.refused
    assert f"the method '{name}' of bold is left out: lorank itself uses this name" in caplog.text


def test_a_name_that_two_packages_take_belongs_to_neither(outside: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(outside, "one", {"nothing": "outside_methods:Nothing"})
    install(outside, "two", {"nothing": "outside_methods:Named"})
    registry = find_allocators()
    assert "nothing" not in registry.classes
    assert registry.refused["nothing"].startswith("one and two register different methods under this name")
    assert "the method 'nothing' of one and two is left out" in caplog.text


CODE = """
import json
from lorank.config import ConfigError, json_schema, make_config, to_yaml
def message(**allocator):
    try:
        make_config({**json.loads(BASE), "allocator": allocator})
    except ConfigError as error:
        return str(error)
config = make_config({**json.loads(BASE), "allocator": {"name": "nothing", "strength": 2}})
print(json.dumps({
    "built": config.allocator.build().describe(),
    "yaml": to_yaml(config),
    "schema": json_schema()["$defs"]["NothingSettings"]["properties"]["strength"],
    "unknown": message(name="nothing", strenght=1),
    "near": message(name="nothin"),
    **{name: message(name=name) for name in ("broken", "named", "unspeakable")},
    "own": make_config({**json.loads(BASE), "allocator": {"name": "alora"}}).allocator.build().describe()["method"],
}))
"""


def test_a_recipe_names_a_package_s_method_and_is_told_why_one_cannot_be_used(outside: Path) -> None:
    methods = {"nothing": "Nothing", "named": "Named", "unspeakable": "Unspeakable"}
    install(outside, "good", {name: f"outside_methods:{value}" for name, value in methods.items()})
    install(outside, "bad", {"broken": "outside_broken:Nothing"})
    base = {"model": {"name": "tiny"}, "task": {"name": "classification", "data": "x"}, "output_dir": "y"}
    code = f"import sys\nsys.path.insert(0, {str(outside)!r})\nBASE = {json.dumps(base)!r}\n{CODE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["built"] == {"method": "Nothing", "strength": 2.0}
    assert "name: nothing\n  strength: 2.0\n" in found["yaml"]
    assert found["schema"]["type"] == "number"
    assert "allocator.strenght: unknown key; did you mean allocator.strength?" in found["unknown"]
    assert "did you mean nothing?" in found["near"]
    assert "name 'broken': the method that bad registers as 'outside_broken:Nothing' cannot be used" in found["broken"]
    assert "No module named 'a_package_that_is_not_there'" in found["broken"]
    assert "it has a setting called 'name'" in found["named"]
    assert "the settings of outside_methods.Unspeakable cannot be written in a recipe" in found["unspeakable"]
    assert found["own"] == "ALoRA"
    for line in ("the method 'broken' of bad is left out", "the method 'named' cannot be used in recipes"):
        assert line in done.stderr
