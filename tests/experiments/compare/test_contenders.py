"""Controls, contenders of another size, and what a comparison measures beside its metric."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorank.config.errors import ConfigError
from lorank.experiments.adapted_model import adapted_model
from lorank.experiments.compare import recipe_runs
from lorank.experiments.compare.comparison import assess, make_subject, run_comparison, wanted_runs
from lorank.experiments.compare.file import read_comparison
from lorank.experiments.compare.recipe_runs import RecipeTrial, task_of
from lorank.experiments.compare.tables import markdown
from lorank.experiments.run_numbers import read_comparison as read_result
from lorank.lora import find_layers

LORA = {"allocator": {"name": "static"}}
METHODS: dict[str, Any] = {
    "LoRA": LORA,
    "moving": {"allocator": {"name": "balanced"}},
    "its ranks": {**LORA, "ranks_of": "moving"},
    "shuffled": {**LORA, "ranks_of": "moving", "shuffled": True},
    "cut at the end": {**LORA, "start": 3, "cut_at_end": True},
    "all weights": {"allocator": {"name": "full"}, "lrs": [1e-4]},
}


@pytest.fixture
def content(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    base = {key: value for key, value in values.items() if key not in ("output_dir", "allocator")}
    base["training"] = {**base["training"], "max_steps": 8}
    base["lora"] = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    return {
        "base": base,
        "methods": METHODS,
        "budgets": [2],
        "lrs": [3e-3],
        "growth": 0,
        "seeds": [0, 1],
        "output_dir": str(tmp_path / "out"),
    }


def written(content: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_controls_begin_with_the_ranks_that_a_method_ended_with(content: dict[str, Any], tmp_path: Path) -> None:
    data = content["base"]["task"]["data"]
    content["base"]["task"] = {"name": "generation", "data": data, "prompt": "{label}", "target": "{text}"}
    content["base"]["task"]["max_new_tokens"] = 4
    other = {"name": "language_modelling", "data": data, "block_size": 8}
    content["forgetting"] = {**other, "validation_split": "validation", "test_split": None}
    del content["methods"]
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(METHODS, sort_keys=False))
    comparison = read_comparison(written({**content, "methods": "methods.yaml"}, tmp_path))
    subject = make_subject(comparison)
    wanted = wanted_runs(comparison, subject, {})
    assert {trial.method for trial in wanted.trials} == {"LoRA", "moving", "cut at the end", "all weights"}
    assert wanted.later == 2 + 6 * 2  # the controls' tuning runs, and every test run
    known = run_comparison(comparison, subject)

    tests = {(line["method"], line["seed"]): line for line in known.values() if line["stage"] == "test"}
    assert len(tests) == 6 * 2
    for seed in (0, 1):
        moved = tests["moving", seed]["ranks"]
        assert len(set(moved.values())) > 1
        assert tests["its ranks", seed]["ranks"] == moved
        shuffled = tests["shuffled", seed]["ranks"]
        for kind in ("q_proj", "v_proj"):  # the two shapes
            ranks = [[r for name, r in some.items() if kind in name] for some in (moved, shuffled)]
            assert sorted(ranks[0]) == sorted(ranks[1])
        assert tests["shuffled", seed]["parameters"] == tests["moving", seed]["parameters"]
        cut = tests["cut at the end", seed]
        assert cut["parameters"] <= tests["LoRA", seed]["parameters"]
        assert cut["most_parameters"] == 3 * tests["LoRA", seed]["parameters"]
        assert tests["all weights", seed]["parameters"] > 100 * tests["LoRA", seed]["parameters"]
        assert tests["all weights", seed]["ranks"] is None
    before = {line["other_loss_before"] for line in tests.values()}
    assert max(before) == pytest.approx(min(before), rel=1e-6), "every run begins as the same model"
    assert all(line["other_loss"] != line["other_loss_before"] for line in tests.values())
    assert not any("other_loss" in line for line in known.values() if line["stage"] == "tuning")

    result = assess(comparison, subject, known)
    rows = {row["method"]: row for row in result["rows"]}
    assert [row["sized"] for row in rows.values()] == [True] * 5 + [False]
    assert rows["all weights"]["notes"] == ["trains all weights of the model, so it is not of the budget's size"]
    assert "all weights" not in result["sentence"]
    assert "other text" in markdown(result).splitlines()[6]
    assert 0 < rows["all weights"]["untrained_loss"] < 20
    assert rows["LoRA"]["untrained_loss"] is None

    (out := tmp_path / "told").mkdir()
    (out / "comparison.json").write_text(json.dumps(result))
    (shown,) = read_result(out / "comparison.json").groups.values()
    assert [one.label for one in shown if one.parameters is None] == ["all weights"]
    assert shown[-1].more["trained parameters"] == str(rows["all weights"]["parameters"])


def test_a_shuffle_differs_between_seeds_and_is_the_same_each_time(content: dict[str, Any], tmp_path: Path) -> None:
    comparison = read_comparison(written(content, tmp_path))
    one = {entry.method: entry.contender for entry in make_subject(comparison).entries}["shuffled"]
    names = list(find_layers(adapted_model(first := _config(comparison), task_of(first))))
    line = {"ranks": {name: place for place, name in enumerate(names)}}
    configs = [one.trial((1e-3, None), seed, "test", line).config for seed in (0, 0, *range(1, 9))]
    assert configs[0] == configs[1]
    assert len(set(configs)) > 1


def _config(comparison: Any) -> Any:
    return next(iter(wanted_runs(comparison, make_subject(comparison), {}).trials)).run_config("-")  # type: ignore[attr-defined]  # a field of this kind of trial


def test_a_control_of_a_failed_run_has_failed(content: dict[str, Any], tmp_path: Path) -> None:
    content["methods"] = {name: METHODS[name] for name in ("LoRA", "moving", "its ranks")}
    comparison = read_comparison(written(content, tmp_path))
    subject = make_subject(comparison)

    def work(trial: RecipeTrial) -> dict[str, Any]:
        if trial.failure is not None:
            return recipe_runs.run_trial(trial, tmp_path)
        failed = trial.method == "moving" and trial.seed == 1
        about = {"method": trial.method, "budget": trial.budget, "lr": trial.lr, "seed": trial.seed}
        found = {"failure": "it diverged", "validation_loss": None, "test": {}}
        names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
        if not failed:
            found = {"failure": None, "validation_loss": 1.0, "test": {"loss": 1.0}, "ranks": dict.fromkeys(names, 1)}
        return {**about, "stage": trial.stage, "parameters": 1, "most_parameters": 1, "seconds": 1.0, **found}

    subject = dataclasses.replace(subject, work=work)
    rows = {row["method"]: row for row in assess(comparison, subject, run_comparison(comparison, subject))["rows"]}
    assert rows["its ranks"]["notes"][-1:] == ["failed, seed 1: moving failed, so it has no ranks"]


def test_what_a_run_is_called_by_does_not_depend_on_defaults(content: dict[str, Any], tmp_path: Path) -> None:
    """So that finished runs stay finished when a later version adds a key."""
    comparison = read_comparison(written(content, tmp_path))
    trial = next(iter(wanted_runs(comparison, make_subject(comparison), {}).trials))
    config = json.loads(trial.config)  # type: ignore[attr-defined]  # a field of this kind of trial
    assert "use_dora" not in config["lora"]
    assert "weight_decay" not in config["training"]
    whole = trial.run_config("-")  # type: ignore[attr-defined]  # a field of this kind of trial
    assert (whole.lora.r, whole.training.max_steps, whole.task.data) == (2, 8, content["base"]["task"]["data"])


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": LORA, "b": {**LORA, "ranks_of": "c"}}, "ranks_of 'c' is not one of the methods a, b"),
        ({"a": LORA, "b": {**LORA, "shuffled": True}}, "shuffled needs ranks_of"),
        ({"a": LORA, "b": {**LORA, "ranks_of": "a"}, "c": {**LORA, "ranks_of": "b"}}, "'b' is itself a control"),
        ({"a": LORA, "b": {"allocator": {"name": "alora"}, "ranks_of": "a"}}, "ranks_of is for allocator"),
        ({"a": LORA, "b": {**LORA, "cut_at_end": True}}, "with start above 1"),
        ({"a": {"allocator": {"name": "full"}}, "b": LORA}, "cannot be the baseline"),
    ],
)
def test_wrong_controls(content: dict[str, Any], tmp_path: Path, methods: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_comparison(written({**content, "methods": methods}, tmp_path))


def test_the_model_must_do_both_tasks(content: dict[str, Any], tmp_path: Path) -> None:
    data = content["base"]["task"]["data"]
    content["forgetting"] = {"name": "language_modelling", "data": data, "block_size": 8}
    with pytest.raises(ConfigError, match="forgetting is a task for a model of the kind causal_lm"):
        make_subject(read_comparison(written(content, tmp_path)))


def test_a_selection_keeps_the_method_that_a_control_needs(content: dict[str, Any], tmp_path: Path) -> None:
    found = read_comparison(written(content, tmp_path), methods=["shuffled"])
    assert list(found.methods) == ["LoRA", "moving", "shuffled"]
