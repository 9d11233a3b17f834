"""The recipes in the package, and paths in a file, which start from the folder of that file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorank.config.errors import ConfigError
from lorank.config.recipes import FOLDER, find_file, recipe_names
from lorank.config.settings import load_config, to_yaml
from lorank.experiments.compare.file import read_comparison
from lorank.experiments.sweep import load_sweep
from tests.config.test_settings import MINIMAL


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, far from the repository."""
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def write(path: Path, values: dict[str, Any], **task: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**values, "task": {**values["task"], **task}} if task else values))
    return path


@pytest.mark.parametrize("given", ["e2e_alora", "e2e_alora.yaml", "recipes/e2e_alora.yaml"])
def test_a_recipe_is_found_by_its_name_from_any_folder(given: str, elsewhere: Path) -> None:
    assert find_file(given) == FOLDER / "e2e_alora.yaml"
    assert load_config(given, ["output_dir=x"]).model.name == "tiny"


def test_a_recipe_in_a_folder_has_the_folder_in_its_name(elsewhere: Path) -> None:
    assert find_file("suite/manual") == find_file("recipes/suite/manual.yaml") == FOLDER / "suite" / "manual.yaml"
    assert "suite/manual" in recipe_names()
    with pytest.raises(ConfigError, match="no such file"):
        find_file("manual")
    with pytest.raises(ConfigError, match="no such file"):
        find_file("suite/_contenders")  # a part of others


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("suite/")])
def test_every_comparison_of_the_suite_is_in_order(name: str, elsewhere: Path) -> None:
    found = read_comparison(name)
    assert found.file.baseline == "LoRA"
    assert found.file.output_dir == f"runs/{name}"
    if found.base is not None:
        assert found.file.factor == 1.7783
        assert {1.0, 2.0} <= set(found.file.references)
        assert not {*found.file.seeds} & {*found.file.tuning_seeds}
        steps = {values["training"]["max_steps"] for _, values in found.methods.values()}
        assert steps == {found.base["training"]["max_steps"], round(found.base["training"]["max_steps"] * 1.25)}


@pytest.mark.parametrize("name", ["ard_ablation", "ard_lambda_beta", "ard_learning_rates"])
def test_a_sweep_finds_its_base_from_any_folder(name: str, elsewhere: Path) -> None:
    runs = [run for setting in load_sweep(name).grid() for run in setting.runs]
    assert {run.allocator.name for run in runs} == {"ard"}


def test_a_file_of_the_user_comes_before_a_recipe_of_the_same_name(elsewhere: Path) -> None:
    write(elsewhere / "recipes" / "e2e_alora.yaml", MINIMAL)
    assert load_config("recipes/e2e_alora.yaml").output_dir == "runs/x"


def test_an_unknown_name_lists_the_recipes(elsewhere: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no such file\. Did you mean 'e2e_alora'\?.*clinc150_lora, .*e2e_alora"
    ) as error:
        load_config("e2e_alra")
    assert all(name in str(error.value) for name in recipe_names())
    with pytest.raises(ConfigError, match=r"is a folder\. Give a YAML file in it"):
        load_config(elsewhere)


def test_data_and_model_of_a_file_are_relative_to_the_file(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "project" / "rows").mkdir(parents=True)
    (tmp_path / "project" / "base").mkdir()
    values = {**MINIMAL, "model": {"name": "base"}}
    file = write(tmp_path / "project" / "run.yaml", values, data="rows")
    config = load_config(os.path.relpath(file))
    assert config.task.data == str(tmp_path / "project" / "rows")
    assert config.model.name == str(tmp_path / "project" / "base")
    assert config.output_dir == "runs/x"  # results go to the current folder
    again = write(tmp_path / "again" / "config.yaml", yaml.safe_load(to_yaml(config)))
    assert load_config(again) == config  # the run's own config.yaml means the same in any folder


def test_a_path_on_the_command_line_is_relative_to_the_current_folder(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "project" / "rows").mkdir(parents=True)
    file = write(tmp_path / "project" / "run.yaml", MINIMAL)
    assert load_config(file, ["task.data=rows"]).task.data == "rows"


def test_a_name_that_is_a_path_only_in_the_current_folder_is_refused(elsewhere: Path, tmp_path: Path) -> None:
    (elsewhere / "rotten_tomatoes").mkdir()
    file = write(tmp_path / "project" / "run.yaml", MINIMAL)
    with pytest.raises(
        ConfigError, match=r"not beside the file that names it.*write task\.data=rotten_tomatoes on the"
    ):
        load_config(file)
    (elsewhere / "rotten_tomatoes").rmdir()
    assert load_config(file).task.data == "rotten_tomatoes"  # the known data set


def test_a_dotted_path_is_searched_beside_the_file_only(elsewhere: Path, tmp_path: Path) -> None:
    (elsewhere / "rows.jsonl").write_text("{}\n")
    file = write(tmp_path / "project" / "run.yaml", MINIMAL, data="./rows.jsonl")
    assert load_config(file).task.data == str(tmp_path / "project" / "rows.jsonl")


def test_paths_in_a_sweep_are_relative_to_the_sweep_and_to_its_base(elsewhere: Path, tmp_path: Path) -> None:
    for folder in ("sweeps/a", "sweeps/b", "bases/rows"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "bases" / "base.yaml", MINIMAL, data="rows")
    sweep = tmp_path / "sweeps" / "sweep.yaml"
    sweep.write_text(
        yaml.safe_dump({"base": "../bases/base.yaml", "space": {"task.data": ["a", "b"]}, "output_dir": "out"})
    )
    assert [setting.runs[0].task.data for setting in load_sweep(sweep).grid()] == [
        str(tmp_path / "sweeps" / x) for x in "ab"
    ]
    sweep.write_text(yaml.safe_dump({"base": "../bases/base.yaml", "seeds": [1], "output_dir": "out"}))
    assert [setting.runs[0].task.data for setting in load_sweep(sweep).grid()] == [str(tmp_path / "bases" / "rows")]
