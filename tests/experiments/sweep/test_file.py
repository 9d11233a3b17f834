"""The YAML file: what it means, and mistakes that show before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorank.config.settings import ConfigError
from lorank.experiments.sweep import load_sweep
from lorank.experiments.sweep.file import SweepFile
from lorank.experiments.sweep.space import Choice

Write = Callable[..., Path]
LR = {"low": 1e-4, "high": 1e-1, "log": True}


def test_trials_of_a_grid_are_variants_times_lists_each_with_all_seeds(write: Write) -> None:
    alora = {"allocator": {"name": "alora", "unit": "steps", "k1": 1}}
    sweep = load_sweep(write(variants={"plain": {}, "moving": alora}))
    settings = sweep.grid()
    assert sweep.count == len(settings) == len(sweep.points) == 2 * 2
    assert [setting.settings["lora.r"] for setting in settings] == [1, 2, 1, 2]
    runs = [run for setting in settings for run in setting.runs]
    assert all(run.training.lr == 1e-5 for run in runs)
    assert [run.allocator.name for run in runs] == ["static"] * 4 + ["alora"] * 4
    assert settings[0].label == "plain, r=1, lr=1e-05"
    assert settings[0].settings == {"variant": "plain", "lora.r": 1, "training.lr": 1e-5}
    folders = [Path(run.output_dir) for run in runs]
    assert len(set(folders)) == 8
    assert all(folder.parent.parent == sweep.out for folder in folders)
    assert [folder.name for folder in folders[:2]] == ["seed0", "seed1"]


def test_the_base_may_be_a_recipe_beside_the_sweep(write: Write, recipe: Path) -> None:
    sweep = load_sweep(write(base="recipe.yaml", space={}), ["training.lr=0.5", "output_dir=elsewhere"])
    [setting] = sweep.grid()
    assert [run.training.seed for run in setting.runs] == [0, 1]
    assert setting.runs[0].training.lr == 0.5
    assert setting.runs[0].output_dir == str(Path("elsewhere") / "base" / "seed0")


def test_changes_hold_for_every_trial_and_the_command_line_may_change_the_sweep(write: Write) -> None:
    sweep = load_sweep(
        write(changes={"lora.alpha": 3}),
        ["sampler=random", "trials=7", "space.lora.r={low: 1, high: 8}", "seeds=[5]", "changes.lora.dropout=0.5"],
    )
    assert sweep.count == 7
    setting = sweep.setting(2, {"lora.r": 6, "training.lr": 1e-5})
    assert [(run.lora.r, run.lora.alpha, run.lora.dropout, run.training.seed) for run in setting.runs] == [
        (6, 3.0, 0.5, 5)
    ]
    assert Path(setting.runs[0].output_dir).parent.name == "002_r=6_lr=1e-05"


def test_values_that_optuna_cannot_store_are_stored_as_text() -> None:
    assert Choice((1, 2.5, "x", None)).stored == (1, 2.5, "x", None)
    modules = Choice((["q_proj"], ["q_proj", "v_proj"]))
    assert modules.stored == ("[q_proj]", "[q_proj, v_proj]")
    assert modules.value("[q_proj]") == ["q_proj"]
    equal = Choice((True, 1))  # equal in Python
    assert [equal.value(stored) for stored in equal.stored] == [True, 1]
    assert equal.value("true") is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"lora.rank": [1]}}, r"lora\.rank: unknown key; did you mean lora\.r\?"),
        ({"space": {"lora.r": [1, 0]}}, r"lora\.r: .*given 0"),
        ({"variants": {"wrong": {"allocator.rounds": 3}}}, r"allocator\.rounds: unknown key"),
        ({"changes": {"allocator.rounds": 3}}, r"allocator\.rounds: unknown key"),
        ({"spaces": {}}, r"spaces: unknown key; did you mean space\?"),
        ({"base": "nowhere.yaml"}, "base: .*nowhere.yaml: there is no such file"),
        ({"space": {"lora.r": []}}, r"space\.lora\.r: has no values: give a list of values, or a range such as \{low"),
        ({"space": {"lora.r": 3}}, r"space\.lora\.r: expected a list of values, or a range .*; given 3"),
        ({"space": {"lora.r": [1, 1]}}, "a value occurs twice"),
        ({"space": {"lora.r": [1, "1"]}}, "two runs would share"),
        ({"seeds": [3, 3]}, "seeds: a value occurs twice"),
        ({"space": {"training.seed": [1, 2]}}, "use the sweep's own key seeds"),
        ({"variants": {"small": {"lora.r": 1}}}, r"lora\.r is in the space and in the variant 'small'"),
        ({"space": {"training.lr": LR}}, r"space\.training\.lr is a range, and sampler grid needs a list"),
        ({"trials": 3}, "trials is for the samplers random and tpe"),
        ({"sampler": "tpe"}, "sampler tpe needs the number of trials, such as trials: 30"),
        ({"sampler": "best"}, "sampler: input should be 'grid', 'random' or 'tpe', given 'best'"),
        ({"objectives": ["test_loss"]}, r"objectives\.0: input should be 'validation_loss', 'parameters'"),
        ({"objectives": ["parameters"], "pruner": "median"}, "pruner median needs the validation loss"),
        ({"space": {"lora.r": {"low": 4, "high": 2}}}, "high must be above low, given low 4 and high 2"),
        ({"space": {"lora.r": {"low": 0, "high": 2, "log": True}}}, "low must be above 0 if log is true"),
        ({"space": {"lora.r": {"low": 1, "hi": 2}}}, r"space\.lora\.r: high: Field required; expected a list"),
        ({"space": {"lora.r": list(range(1, 5002))}}, "trials × seeds give 10,002 runs; a sweep has at most 10,000"),
        ({"sampler": "tpe", "trials": 2, "space": {"lora.r": {"low": 0, "high": 8}}}, r"lora\.r: .*given 0"),
    ],
)
def test_mistakes_show_before_anything_runs(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(write(**changes))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trials", "expected a key of the sweep with a value, as in trials=30"),
        ("base=e2e_ard", "expected a key of the sweep"),
        ("trials=[", "the value is not YAML"),
        ("trials=many", "trials: input should be a valid integer"),
    ],
)
def test_a_wrong_override_of_the_sweep_is_told(write: Write, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(write(), [override])


def test_the_old_key_grid_is_told_the_new_one(write: Write) -> None:
    path = write()
    path.write_text(path.read_text().replace("space:", "grid:"))
    with pytest.raises(ConfigError, match="grid: unknown key; did you mean space"):
        load_sweep(path)


def test_each_run_resolves_its_own_references(write: Write) -> None:
    sweep = load_sweep(
        write(space={"lora.r": [1, 2]}, variants={"a": {"lora.alpha": "${lora.r}"}, "b": {}}, seeds=[3]),
        ["training.eval_steps=${training.seed}"],
    )
    runs = [run for setting in sweep.grid() for run in setting.runs]
    assert [run.lora.alpha for run in runs] == [1, 2, 8, 8]
    assert {run.training.eval_steps for run in runs} == {3}


def test_the_folder_of_a_sweep_cannot_refer_to_keys_of_its_runs(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"output_dir: \$\{lora\.r\}: there is no such key"):
        load_sweep(write(output_dir="runs/${lora.r}"))


def test_a_malformed_override_is_told_once_for_all_runs(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(), ["training.lr", "lora.r.x=1"])
    assert str(caught.value).count("expected key=value") == 1
    assert str(caught.value).count("lora.r is 4 and has no keys below it") == 1


@pytest.mark.parametrize(("name", "count"), [("ard_ablation", 4), ("ard_lambda_beta", 12), ("ard_learning_rates", 12)])
def test_the_sweeps_that_come_with_lorank_are_right(name: str, count: int) -> None:
    sweep = load_sweep(name)
    assert sweep.count == count
    assert {run.allocator.name for setting in sweep.grid() for run in setting.runs} == {"ard"}


def test_the_file_in_the_documentation_is_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "sweeping.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    sweep = load_sweep(tmp_path / "mine.yaml")
    assert (sweep.count, len(sweep.file.seeds), sweep.file.objectives) == (40, 2, ["validation_loss", "parameters"])
    described = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert described <= set(SweepFile.model_fields) | {"ard_lambda_beta", "ard_learning_rates", "ard_ablation"}
    assert set(SweepFile.model_fields) <= described
