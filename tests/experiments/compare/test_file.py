from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorank.config.errors import ConfigError
from lorank.config.settings import make_config
from lorank.experiments.compare.file import read_comparison

Write = Callable[..., Path]
RECIPES = Path(str(files("lorank") / "recipes"))
COMPARISONS = [
    *sorted(RECIPES.glob("compare_*.yaml")),
    *(path for path in sorted(RECIPES.glob("suite/*.yaml")) if not path.stem.startswith("_")),
]


@pytest.fixture
def write(values: dict[str, Any], tmp_path: Path) -> Write:
    """The file of a comparison, with changes."""

    def build(**changes: Any) -> Path:
        base = {key: value for key, value in values.items() if key not in ("output_dir", "allocator")}
        content = {
            "base": base,
            "methods": {"LoRA": {"allocator": {"name": "static"}}, "moving": {"allocator": {"name": "alora"}}},
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return build


def test_every_method_has_a_whole_configuration(write: Write) -> None:
    wide = {"allocator": {"name": "sora"}, "start": 3, "title": "SoRA, wide", "lrs": ["1e-2"], "lora.dropout": 0.5}
    found = read_comparison(write(methods={"LoRA": None, "sora": wide}), ["training.batch_size=2", "seeds=[4]"])
    assert found.name == "mine"
    assert found.file.baseline == "LoRA"
    assert found.file.seeds == [4]
    keys, config = found.methods["sora"]
    assert (keys.start, keys.title, keys.lrs) == (3, "SoRA, wide", [0.01])
    assert (config["allocator"], config["lora"]["dropout"]) == ({"name": "sora"}, 0.5)
    plain = found.methods["LoRA"][1]
    assert (plain["allocator"], plain["lora"].get("dropout")) == ({"name": "static"}, None)
    assert {one["training"]["batch_size"] for one in (config, plain, found.base or {})} == {2}


def test_a_method_may_train_longer_and_a_quick_look_keeps_the_ratio(write: Write) -> None:
    file = write(methods={"LoRA": None, "longer": {"allocator": {"name": "static"}, "steps": 1.5}})
    for quick, steps in ((False, 12), (True, 4)):
        found = read_comparison(file, quick=quick).methods
        assert found["LoRA"][1]["training"]["max_steps"] == steps
        assert found["longer"][1]["training"]["max_steps"] == 1.5 * steps
        assert found["longer"][1]["training"]["epochs"] == pytest.approx(1.5 * found["LoRA"][1]["training"]["epochs"])


def test_the_base_may_be_a_recipe(write: Write, recipe: Path) -> None:
    found = read_comparison(write(base="recipe.yaml"))
    assert found.methods["moving"][1]["lora"]["r"] == 4
    assert read_comparison(write(base="e2e_lora")).methods["LoRA"][1]["model"] == {"name": "tiny"}


def test_references_contain_the_size_of_the_budget_itself(write: Write) -> None:
    assert read_comparison(write(references=[0.5, 2])).file.references == [0.5, 2, 1]
    assert read_comparison(write(references=[])).file.references == []


def test_a_quick_look_is_smaller_and_has_a_folder_of_its_own(write: Write) -> None:
    file = write(budgets=[1, 2], seeds=[0, 1, 2], lrs=[1e-3, 2e-3, 4e-3, 8e-3], references=[1, 2, 4])
    quick, whole = read_comparison(file, quick=True), read_comparison(file)
    assert quick.quick
    assert quick.name == "mine (quick)"
    assert (quick.file.budgets, quick.file.seeds, quick.file.growth) == ([1], [0, 1], 0)
    assert (quick.file.lrs, quick.file.references) == ([2e-3, 4e-3], [1, 2])
    assert quick.file.output_dir == str(Path(whole.file.output_dir) / "quick")
    assert quick.methods["LoRA"][1]["training"]["max_steps"] == 4
    assert whole.methods["LoRA"][1]["training"]["max_steps"] == 12
    more = read_comparison(file, ["training.max_steps=9"], quick=True)
    assert more.methods["LoRA"][1]["training"]["max_steps"] == 9, "what is asked for wins"


def test_some_methods_and_the_baseline(write: Write) -> None:
    methods = {name: {"allocator": {"name": name}} for name in ("static", "alora", "balanced")}
    found = read_comparison(write(methods=methods), methods=["balanced"])
    assert list(found.methods) == ["static", "balanced"]
    with pytest.raises(ConfigError, match="--methods blanced: 'blanced' is not one of the methods static, alora"):
        read_comparison(write(methods=methods), methods=["blanced"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, r"method: unknown key; did you mean methods\?"),
        ({"methods": {}}, "methods: .*at least 1 item"),
        ({"base": None}, r"give either base \(a recipe\) or task: planted"),
        ({"task": "planted"}, r"give either base \(a recipe\) or task: planted"),
        ({"base": "nowhere.yaml"}, "base: .*nowhere.yaml: there is no such file"),
        ({"seeds": [0, 1], "tuning_seeds": [1]}, r"seeds and tuning_seeds share \[1\]"),
        ({"seeds": [0, 0]}, "a value occurs twice"),
        ({"lrs": [0.1, -1.0]}, "expected numbers above 0"),
        ({"references": [0]}, "such as \\[1, 2, 4\\]"),
        ({"baseline": "Lora"}, "baseline 'Lora' is not one of the methods LoRA, moving"),
        ({"planted": {"steps": 100}}, "planted: belongs to task: planted"),
        ({"methods": {"a": {"allocator": {"name": "full"}}}}, "full fine-tuning has no budget"),
        ({"methods": {"a": {"allocator": "alora"}}}, "methods.a: no allocator"),
        ({"methods": {"a, b": None}}, "methods: 'a, b' has a comma"),
        ({"methods": {"a": {"start": 0.5}}}, r"methods\.a: 1 error\n.*start: .*given 0.5"),
        ({"methods": {"a": {"lora.rank": 2}}}, r"lora\.rank: unknown key; did you mean lora\.r\?"),
        ({"methods": {"a": {"lora": {"r": 2}}}}, r"lora\.r cannot differ between methods: set budgets"),
        ({"methods": {"a": {"training.lr": 2}}}, r"training\.lr cannot differ between methods: set lrs"),
        ({"methods": {"a": {"allocator": {"name": "alora", "budget": 2}}}}, r"allocator\.budget cannot differ"),
        ({"methods": {"a": {"task.max_eval": 2}}}, "task is the same for all methods: set it in the base"),
    ],
)
def test_mistakes_show_at_once(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_comparison(write(**changes))


def test_all_mistakes_are_told_together(write: Write) -> None:
    wrong = {"a": {"lora.rank": 2}, "b": {"training.seed": 2, "start": 0}}
    with pytest.raises(ConfigError) as caught:
        read_comparison(write(methods=wrong))
    assert all(part in str(caught.value) for part in ("lora.rank", "training.seed cannot differ", "start: "))


def test_mistakes_in_the_base_are_told_once(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: base: 2 errors") as caught:
        read_comparison(write(), ["lora.rank=2", "training.lr=fast"])
    assert str(caught.value).count("lora.rank") == 1
    with pytest.raises(ConfigError, match=r"budget=\[2\]: budget is a key of neither .*; did you mean budgets\?"):
        read_comparison(write(), ["budget=[2]"])


def test_the_recipe_of_one_run_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match=r"e2e_lora is the recipe of one run. .*compare_e2e"):
        read_comparison("e2e_lora")


def test_planted_has_settings_of_its_own(write: Write) -> None:
    methods = {"uniform": None, "alora": None}
    file = write(base=None, task="planted", methods=methods)
    found = read_comparison(file, ["planted.steps=30", "planted.where=heads"])
    assert (found.file.planted.steps, found.file.planted.where, found.base) == (30, "heads", None)
    assert read_comparison(file, quick=True).file.planted.steps == 400
    with pytest.raises(ConfigError, match="the task planted has no base"):
        read_comparison(file, ["training.lr=1"])
    wrong = {"methods": {"uniform": {"start": 2}}, "lrs": [0.1]}
    with pytest.raises(ConfigError, match=r"lrs: the task planted has its own.*have no settings here"):
        read_comparison(write(**{"base": None, "task": "planted", **wrong}))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_that_comes_with_lorank_can_be_read(path: Path) -> None:
    found = read_comparison(path)
    assert found.file.baseline in found.methods
    if found.file.task is None:
        for name, (_, values) in found.methods.items():
            make_config(values, source=name)


@pytest.mark.parametrize("name", ["compare_e2e", "compare_planted"])
def test_the_comparisons_that_come_with_lorank_are_right(name: str) -> None:
    found = read_comparison(name)
    assert len(found.methods) >= 6
    assert found.file.references == [1, 2, 4]
