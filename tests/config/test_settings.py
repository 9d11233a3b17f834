"""Configuration: defaults from the allocators themselves, overrides, and errors that say everything at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from lorank.allocators import Allocation, Allocator, Context, State
from lorank.config.errors import OTHER_NAMES, _models
from lorank.config.recipes import FOLDER
from lorank.config.settings import (
    ALLOCATORS,
    METHODS,
    ConfigError,
    RunConfig,
    _section,
    json_schema,
    load_config,
    make_config,
    to_yaml,
)
from lorank.errors import ScheduleError

ROOT = Path(__file__).parents[2]
FILES = [path for path in sorted(FOLDER.glob("*.yaml")) if not path.stem.startswith("compare_")]
SWEEPS = [path for path in FILES if "base" in yaml.safe_load(path.read_text(encoding="utf-8"))]
RECIPES = [path for path in FILES if path not in SWEEPS]
MINIMAL: dict[str, Any] = {
    "model": {"name": "tiny"},
    "task": {"name": "classification", "data": "rotten_tomatoes"},
    "allocator": {"name": "alora"},
    "output_dir": "runs/x",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_configuration_and_survives_writing_out(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_can_be_read_with_all_its_runs(sweep: Path) -> None:
    from lorank.experiments.sweep import load_sweep

    assert load_sweep(sweep).count > 1


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 7


@pytest.mark.parametrize("name", METHODS)
def test_allocators_have_the_defaults_of_their_own_dataclass(name: str) -> None:
    built = ALLOCATORS[name].model_validate({"name": name})
    assert built.build() == METHODS[name]()
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    assert set(ALLOCATORS[name].model_fields) == fields | {"name"}


def test_settings_reach_the_allocator(file: Path) -> None:
    config = load_config(file, ["allocator.rounds=3", "allocator.terms=without", "allocator.k1=0.2"])
    assert config.allocator.build() == METHODS["alora"](rounds=3, terms="without", k1=0.2)


def test_overrides_are_yaml_and_the_last_one_wins(file: Path) -> None:
    config = load_config(
        file,
        [
            "training.lr=3e-4",
            "training.max_steps=5",
            "training.max_steps=7",
            "lora.target_modules=[q_proj, v_proj]",
            "task.test_split=null",
            "allocator={name: static}",
        ],
    )
    assert config.training.lr == 3e-4
    assert config.training.max_steps == 7
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.task.test_split is None
    assert config.allocator.build() == METHODS["static"]()


def test_malformed_overrides_are_all_named(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["training.lr", "=3", "a..b=1", "model.name.x=1", "lora.r=[1"])
    message = str(caught.value)
    assert message.count("expected key=value") == 3
    assert "model.name is 'tiny' and has no keys below it" in message
    assert "'lora.r=[1': the value is not YAML" in message


def errors(changes: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_config({**MINIMAL, **changes})
    return [line.strip() for line in str(caught.value).splitlines()]


def test_all_errors_come_at_once_with_the_nearest_known_key() -> None:
    lines = errors(
        {
            "training": {"learning_rate": 1e-4, "epoch": 2, "batch_size": 0},
            "lora": {"rank": 4},
            "task": {"name": "classification", "data": "x", "tamplate": "{text}"},
            "allocator": {"name": "alora", "round": 3},
            "lr": 1e-4,
            "zzz": 1,
        }
    )
    assert lines[0] == "configuration: 8 errors"
    assert set(lines[1:]) == {
        "training.learning_rate: unknown key; did you mean training.lr?",
        "training.epoch: unknown key; did you mean training.epochs?",
        "training.batch_size: input should be greater than or equal to 1, given 0",
        "lora.rank: unknown key; did you mean lora.r?",
        "task.tamplate: unknown key; did you mean task.template?",
        "allocator.round: unknown key; did you mean allocator.rounds?",
        "lr: unknown key; did you mean training.lr?",
        "zzz: unknown key; known here: model, lora, task, allocator, allocator_samples, training, output_dir",
    }


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"allocator": {"name": "alroa"}},
            "allocator.name: 'alroa' is not one of static, balanced, alora, alora_dnas, alora_sensi, ard, adalora, "
            "sora, full; did you mean alora?",
        ),
        ({"allocator": {}}, "allocator.name: is missing, expected one of static, balanced, alora"),
        (
            {"allocator": {"name": "static", "rounds": 4}},
            "allocator.rounds: unknown key here; it is a key of allocator.name=alora",
        ),
        (
            {"allocator": {"name": "full"}, "model": {"name": "m", "quantised": "nf4"}},
            "(top level): model.quantised is nf4 and allocator.name is full, but quantised weights cannot be trained",
        ),
        ({"model": {"name": "m", "quantised": "nf5"}}, "model.quantised: input should be 'nf4' or 'int8'"),
        ({"model": {}}, "model.name: is missing (A model on the Hugging Face hub (owner/name), a folder,"),
        ({"allocator": {"name": "alora", "k1": -1}}, "allocator.k1: input should be greater than 0, given -1"),
        ({"allocator": {"name": "alora", "rounds": 0}}, "allocator.rounds: expected at least 1. For plain LoRA use"),
        ({"allocator": {"name": "static", "budget": "8 apples"}}, "allocator.budget: budget '8 apples': expected 8 ("),
        ({"allocator": {"name": "ard", "tau_end": 0.6}}, "allocator: ARDLoRA(tau_end=0.6): expected at most tau_start"),
        ({"allocator": {"name": "alora", "terms": "some"}}, "allocator.terms: input should be 'both', 'without' or"),
        ({"training": {"patience": 2, "load_best_model_at_end": False}}, "training: patience needs"),
        ({"training": {"save_steps": 150}}, "training: save_steps is 150 and eval_steps 200"),
        ({"training": {"lr": "fast"}}, "training.lr: input should be a valid number"),
        ({"training": {"lr": float("inf")}}, "training.lr: input should be a finite number"),
        (
            {"task": {"name": "classification", "data": "x", "template": "text"}},
            "task.template: 'text' reads no column",
        ),
        ({"task": {"name": "generation", "data": "mine"}}, "task.prompt: is missing"),
        ({"lora": [1]}, "lora: input should be a valid dictionary"),
    ],
)
def test_one_error(changes: dict[str, Any], line: str) -> None:
    assert any(found.startswith(line) for found in errors(changes)), errors(changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: a}\nmodel: {name: b}\n", "the key 'model' occurs twice"),
        ("model: [", "is not YAML"),
        ("- a list", "holds list, expected keys"),
        ("model: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_files_that_are_not_a_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_schema_names_every_key_and_describes_it() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    training = schema["$defs"]["TrainingSettings"]["properties"]
    assert all(value.get("description") for value in training.values())
    assert set(schema["$defs"]) >= {"ALoRASettings", "StaticLoRASettings", "GenerationSettings"}


def test_the_schema_has_the_bounds_of_every_setting_of_a_method() -> None:
    definitions = json_schema()["$defs"]
    alora, ard = (definitions[f"{name}Settings"]["properties"] for name in ("ALoRA", "ARDLoRA"))
    assert alora["k1"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0}
    assert alora["rounds"]["minimum"] == 1
    assert alora["per_round"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert alora["unit"]["enum"] == ["run", "epochs", "steps"]
    assert (ard["epsilon"]["exclusiveMinimum"], ard["epsilon"]["exclusiveMaximum"]) == (0, 0.5)
    assert (ard["reach"]["exclusiveMinimum"], ard["reach"]["maximum"]) == (0, 1)
    assert definitions["Budget"]["properties"]["percent"]["anyOf"][0]["maximum"] == 100
    assert alora["k1"]["description"].startswith("K1, how long to train before the first round")
    for method in METHODS.values():
        properties = definitions[f"{method.__name__}Settings"]["properties"]
        assert all(value.get("description") for key, value in properties.items() if key != "name")


@dataclasses.dataclass(frozen=True)
class Plain(Allocator):
    """A method from outside, which knows nothing of pydantic.

    Args:
        share: a part of the ranks.
    """

    share: float
    names: tuple[str, ...] = dataclasses.field(default_factory=tuple)
    made: int = dataclasses.field(init=False, default=3)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ScheduleError(f"Plain(share={self.share}): expected a part")

    def allocate(self, context: Context, state: State) -> Allocation | None:
        return None


def test_a_method_that_is_a_plain_dataclass_has_a_section_too() -> None:
    section = _section("plain", Plain)
    assert section.model_validate({"name": "plain", "share": 0.5, "names": ["a"]}).build() == Plain(0.5, ("a",))
    schema = section.model_json_schema()
    assert schema["properties"]["share"]["description"] == "a part of the ranks."
    assert schema["required"] == ["name", "share"]
    assert set(schema["properties"]) == {"name", "share", "names"}
    with pytest.raises(ValidationError, match=r"Plain\(share=2\.0\): expected a part"):
        section.model_validate({"name": "plain", "share": 2})
    with pytest.raises(ValidationError, match="share\n  Field required"):
        section.model_validate({"name": "plain"})


def test_names_from_other_libraries_lead_to_keys_that_exist() -> None:
    keys = {key for section in RunConfig.model_fields for key in _keys(section)}
    assert set(OTHER_NAMES.values()) <= keys
    assert not set(OTHER_NAMES) & keys


def _keys(section: str) -> set[str]:
    return {key for model in _models(RunConfig.model_fields[section].annotation) for key in model.model_fields}


@pytest.mark.parametrize("name", ["e2e", "rotten_tomatoes", "clinc150"])
def test_each_recipe_and_its_baseline_differ_in_the_allocator_alone(name: str) -> None:
    folder = RECIPES[0].parent
    alora, lora = (load_config(folder / f"{name}_{method}.yaml") for method in ("alora", "lora"))
    own = {"allocator": lora.allocator, "allocator_samples": lora.allocator_samples, "output_dir": lora.output_dir}
    assert alora.model_copy(update=own) == lora


@pytest.mark.parametrize("section", ["model", "lora", "training"])
def test_the_documentation_has_every_key_with_its_default(section: str) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (model,) = _models(RunConfig.model_fields[section].annotation)
    for key, field in model.model_fields.items():
        default = "–" if field.is_required() else f"`{yaml.safe_dump(field.default).splitlines()[0]}`"
        assert f"| `{key}` | {default} |" in text, key


@pytest.mark.parametrize("name", METHODS)
def test_the_documentation_names_every_field_of_every_method(name: str) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(METHODS[name]))
    assert row.endswith(f"| {fields} |")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_section_builds_it_with_its_own_defaults(name: str) -> None:
    config = make_config({**MINIMAL, "allocator": {"name": name}})
    assert config.allocator.build() == METHODS[name]()
    assert make_config(yaml.safe_load(to_yaml(config))) == config
