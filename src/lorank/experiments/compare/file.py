"""The YAML file of a comparison. It is checked before anything slow is imported.

base: e2e_lora                       # a recipe, a YAML file beside this one, or a whole configuration
methods:
  LoRA: {allocator: {name: static}}
  BalancedLoRA: {allocator: {name: balanced}}
  AdaLoRA: {allocator: {name: adalora}, start: 2}
baseline: LoRA
budgets: [2, 4]
lrs: [0.005, 0.01, 0.02, 0.04]
tuning_seeds: [100]
seeds: [0, 1, 2]
references: [1, 2, 4]
output_dir: runs/my_comparison
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from lorank.config.errors import ConfigError, explain
from lorank.config.recipes import find_file, with_absolute_paths
from lorank.config.sections import RunSections, TrainingSettings
from lorank.config.yaml_files import apply_overrides, read_yaml
from lorank.tasks.settings import Settings, TaskSettings

WIDE_STARTS = {"adalora": 2.0, "sora": 2.0}
"""Methods that prune down to their budget: where they begin by default, as a multiple of the budget."""
RESERVED = {
    "allocator.budget": "budgets",
    "lora.r": "budgets (and start, for a method that begins wider)",
    "output_dir": "output_dir",
    "training.lr": "lrs",
    "training.seed": "seeds",
    "training.load_best_model_at_end": "nothing: a comparison reports the weights after the last step",
    "training.patience": "nothing: all methods have the same number of steps",
}
"""Keys that a method cannot change, and the key of the comparison that does."""


class PlantedSettings(Settings):
    """The problems of the task `planted` (docs/planted.md)."""

    where: Literal["modules", "heads"] = "modules"
    """Plant ranks in whole modules, or in attention heads."""
    sized: Literal["weight", "effect"] = "weight"
    """What is equal for all planted ranks: their size relative to the weight, or their effect on the logits."""
    steps: int = Field(default=2400, ge=20)
    """Optimiser steps of every student."""


class MethodKeys(Settings):
    """The keys of a method that are not changes of the base."""

    title: str | None = None
    """Its name in tables; null: its key in the file."""
    start: float | None = Field(default=None, ge=1)
    """How wide it begins, as a multiple of the budget; null: 2 for adalora and sora, which only prune, else 1."""
    lrs: list[Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Its own first grid of learning rates."""
    steps: float = Field(default=1.0, gt=0)
    """How long it trains, as a multiple of the base's steps: what the same computing time would give elsewhere."""
    ranks_of: str | None = None
    """A control: it begins with the ranks that this method ended with, at the same budget and with the same seed. With
    `allocator: {name: static}`, the question is whether the ranks are enough without the way to them."""
    shuffled: bool = False
    """With ranks_of: these ranks are shuffled among modules of the same shape. So only their sizes are kept."""
    cut_at_end: bool = False
    """It trains `start` times the budget to the end, and is then cut to the budget by balanced truncation, as
    `lorank prune` does, and not trained any more. For `allocator: {name: static}`."""


class CompareFile(Settings):
    """The content of a comparison's YAML file."""

    base: str | dict[str, Any] | None = None
    """A recipe: its name, or the path of a YAML file, relative to this file; or a whole configuration. It gives the
    model, the task, the training and the adapter's scaling (alpha / r), which are the same for all methods."""
    task: Literal["planted"] | None = None
    """Instead of a base: planted, the task whose true ranks are known (docs/planted.md)."""
    planted: PlantedSettings = PlantedSettings()
    """Settings of the task planted."""
    methods: Annotated[dict[str, dict[str, Any] | None], Field(min_length=1)]
    """By name: changes of the base, such as `allocator: {name: balanced}`, as sections or dotted keys; and `title`,
    `start` (how wide the method begins, as a multiple of the budget), `lrs` (its own first grid), `steps` (as a
    multiple of the base's), and the keys of controls (`ranks_of`, `shuffled`, `cut_at_end`). For the task planted:
    names of its methods, each without changes. Or the path of a YAML file with such methods, relative to this file."""
    baseline: str | None = None
    """The method that the others are compared with; null: the first one."""
    budgets: list[float | str | dict[str, Any]] = Field(default=["100% of adapter"], min_length=1)
    """Budgets, in any form that lorank knows: 2 (ranks per module), 50k params, 0.5% of base, 100% of adapter."""
    lrs: list[float] = Field(default=[5e-4, 1e-3, 2e-3, 4e-3], min_length=1)
    """The first learning rates to try, a `factor` apart. The grid grows until both neighbours of the best are
    worse."""
    growth: int = Field(default=4, ge=0)
    """The largest number of learning rates by which a grid grows."""
    factor: float = Field(default=2.0, gt=1)
    """The ratio of neighbouring learning rates by which a grid grows; 1.78 is a quarter of a decade."""
    tuning_seeds: list[int] = Field(default=[100], min_length=1)
    """Seeds of the runs that choose learning rates, by validation data alone."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of the runs that are reported, on test data."""
    references: list[float] = Field(default_factory=list)
    """Sizes k: LoRA with k times the parameters of each budget is run too, and differences are told in this unit. 1,
    the budget itself, is added if it is missing."""
    forgetting: TaskSettings | None = None
    """Another task, on whose validation part the model is measured before and after each test run: what it forgets."""
    metric: str = "loss"
    """The test metric that is compared: loss; or accuracy, bleu, rouge_l, perplexity, as far as the task has it."""
    output_dir: str = Field(min_length=1)
    """The folder for all runs and results."""

    @field_validator("references")
    @classmethod
    def _with_one(cls, references: list[float]) -> list[float]:
        """Without the size of the budget itself, a method as good as LoRA would be worth another LoRA than 1."""
        return [*references, 1.0] if references and 1 not in references else references

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = []
        if (self.base is None) == (self.task is None):
            wrong.append("give either base (a recipe) or task: planted")
        both = sorted({*self.seeds} & {*self.tuning_seeds})
        if both:
            wrong.append(f"seeds and tuning_seeds share {both}: rates are chosen on seeds that are not reported")
        for key in ("seeds", "tuning_seeds", "lrs", "budgets", "references"):
            values = getattr(self, key)
            if any(value in values[:place] for place, value in enumerate(values)):
                wrong.append(f"{key} {values}: a value occurs twice")
        if not all(lr > 0 for lr in self.lrs):
            wrong.append(f"lrs {self.lrs}: expected numbers above 0")
        if not all(seed >= 0 for seed in [*self.seeds, *self.tuning_seeds]):
            wrong.append("seeds and tuning_seeds: expected numbers of at least 0")
        if not all(k > 0 for k in self.references):
            wrong.append(f"references {self.references}: expected numbers above 0, such as [1, 2, 4]")
        if commas := [name for name in self.methods if "," in name]:
            wrong.append(f"methods: {commas[0]!r} has a comma, which separates names in --methods; put it into title")
        if self.baseline is not None and self.baseline not in self.methods:
            wrong.append(f"baseline {self.baseline!r} is not one of the methods {', '.join(self.methods)}")
        if self.task is not None:
            given = [
                key
                for key in ("budgets", "lrs", "growth", "factor", "metric", "forgetting")
                if key in self.model_fields_set
            ]
            if given:
                wrong.append(f"{', '.join(given)}: the task planted has its own; leave this out")
            if any(self.methods.values()):
                wrong.append("methods: those of the task planted have no settings here; write them as `alora:`")
        elif "planted" in self.model_fields_set:
            wrong.append("planted: belongs to task: planted; leave it out")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


@dataclass(frozen=True)
class Comparison:
    """A checked file.

    Args:
        name: the name of the file, for titles.
        file: its content.
        base: the values of the base, with the changes given on the command line; None for the task planted.
        methods: per method, its own keys and the values of its whole configuration.
        quick: whether it was made smaller by :func:`quick`.
    """

    name: str
    file: CompareFile
    base: dict[str, Any] | None
    methods: Mapping[str, tuple[MethodKeys, dict[str, Any]]]
    quick: bool = False


def read_comparison(
    path: str | Path, overrides: Sequence[str] = (), *, methods: Sequence[str] | None = None, quick: bool = False
) -> Comparison:
    """Reads the file of a comparison and its base, and checks all that needs no model.

    Args:
        path: the YAML file, or the name of a recipe in the package.
        overrides: `key=value`. The keys of the comparison (`seeds=[0,1]`), or dotted keys of the base
            (`training.max_steps=50`).
        methods: only these methods, and the baseline.
        quick: a first look, see :func:`_quick`.

    Raises:
        ConfigError: a file does not exist or is not YAML, or keys or values are wrong. The message lists all errors.
    """
    file = find_file(path)
    values = read_yaml(file)
    if "methods" not in values and "model" in values and "allocator" in values:
        raise ConfigError(
            f"{path} is the recipe of one run. A comparison is a file with methods, and a recipe as its base, such as "
            "compare_e2e (docs/comparing.md)."
        )
    if isinstance(values.get("methods"), str):
        values["methods"] = read_yaml(find_file(values["methods"], beside=file.parent))
    own = [text for text in overrides if _is_own(text)]
    values = {**values, **apply_overrides({key: v for key, v in values.items() if key not in ("base", "methods")}, own)}
    try:
        content = CompareFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, CompareFile, str(path))) from error
    content = _selected(content, methods)
    if quick:
        content = _quick(content)
    for_base = [text for text in overrides if text not in own]
    name = Path(path).stem + (" (quick)" if quick else "")
    if content.base is None:
        if for_base:
            raise ConfigError(f"{for_base[0]}: the task planted has no base; its settings are planted.steps=… and such")
        return Comparison(name, content, None, {key: (MethodKeys(), {}) for key in content.methods}, quick)
    base = _base(content, file)
    if quick:
        base = _times_steps(base, 1 / 3)  # overrides come later, and win
    _check_names(for_base)
    changed = apply_overrides(base, for_base)
    try:
        RunSections.model_validate(changed)
    except ValidationError as error:  # told once, not again for every method
        raise ConfigError(explain(error, RunSections, f"{path}: base")) from error
    return Comparison(name, content, changed, _checked(content, base, for_base, str(path)), quick)


def _is_own(override: str) -> bool:
    return override.partition("=")[0].strip().split(".")[0] in CompareFile.model_fields and not override.startswith(
        "task."
    )


def _check_names(overrides: Sequence[str]) -> None:
    """Raises ConfigError if an override names a key of neither the comparison nor its base."""
    known = [*CompareFile.model_fields, *RunSections.model_fields]
    for override in overrides:
        key, equals, _ = override.partition("=")
        section = key.strip().split(".")[0]
        if equals and section not in known:
            near = get_close_matches(section, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{override}: {section} is a key of neither the comparison ({', '.join(CompareFile.model_fields)}) nor "
                f"its base ({', '.join(RunSections.model_fields)}){hint}"
            )


def _selected(content: CompareFile, methods: Sequence[str] | None) -> CompareFile:
    baseline = content.baseline or next(iter(content.methods))
    if methods is None:
        return content.model_copy(update={"baseline": baseline})
    unknown = [name for name in methods if name not in content.methods]
    if unknown or not methods:
        raise ConfigError(
            f"--methods {','.join(methods)}: {unknown[0] if unknown else ''!r} is not one of the methods "
            f"{', '.join(content.methods)}"
        )
    needed = {*methods, baseline}
    # a control needs the method whose ranks it takes
    needed |= {str((content.methods[name] or {}).get("ranks_of", name)) for name in methods}
    kept = {name: value for name, value in content.methods.items() if name in needed}
    return content.model_copy(update={"baseline": baseline, "methods": kept})


def _quick(content: CompareFile) -> CompareFile:
    """A first look: the first budget, two rates without growth, one tuning seed, two seeds, a folder of its own."""
    middle = (len(content.lrs) - 1) // 2
    smaller: dict[str, Any] = {
        "lrs": sorted(content.lrs)[middle : middle + 2],
        "growth": 0,
        "budgets": content.budgets[:1],
        "tuning_seeds": content.tuning_seeds[:1],
        "seeds": content.seeds[:2],
        "references": [k for k in sorted(content.references) if k <= 2],
        "output_dir": str(Path(content.output_dir) / "quick"),
    }
    if content.task is not None:
        smaller["planted"] = content.planted.model_copy(update={"steps": min(content.planted.steps, 400)})
    return content.model_copy(update=smaller)


def _times_steps(base: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A configuration with so many times its training."""
    training = base.get("training") or {}
    if not isinstance(training, Mapping) or factor == 1:
        return dict(base)  # if not a mapping: a mistake, which is told when the base is checked
    given = {"epochs": TrainingSettings().epochs, **training}
    changed = {key: given[key] * factor for key in ("epochs", "max_steps") if isinstance(given.get(key), int | float)}
    if "max_steps" in changed:
        changed["max_steps"] = max(1, round(changed["max_steps"]))
    return {**base, "training": {**training, **changed}}


def _base(content: CompareFile, file: Path) -> dict[str, Any]:
    if isinstance(content.base, dict):
        values, folder = content.base, file.parent
    else:
        try:
            found = find_file(str(content.base), beside=file.parent)
        except ConfigError as error:
            raise ConfigError(f"{file}: base: {error}") from error
        values, folder = read_yaml(found), found.parent
    # each run has a folder of its own only while it lasts
    return {"allocator": {"name": "static"}, **with_absolute_paths(values, folder), "output_dir": content.output_dir}


def _checked(
    content: CompareFile, base: Mapping[str, Any], overrides: Sequence[str], source: str
) -> dict[str, tuple[MethodKeys, dict[str, Any]]]:
    """The own keys and the whole configuration of every method, checked but for the allocators' settings."""
    made, wrong = {}, []
    for name, given in content.methods.items():
        own = {key: value for key, value in (given or {}).items() if key in MethodKeys.model_fields}
        changes = {key: value for key, value in (given or {}).items() if key not in own}
        wrong += [f"methods.{name}: {problem}" for problem in _reserved_keys(changes)]
        try:
            keys = MethodKeys.model_validate(own)
        except ValidationError as error:
            wrong.append(explain(error, MethodKeys, f"methods.{name}"))
            continue
        try:
            values = apply_overrides(base, [*overrides, *(f"{key}={_yaml(changes[key])}" for key in changes)])
            values = _times_steps(values, keys.steps)
            if not isinstance(values.get("allocator"), Mapping) or "name" not in values["allocator"]:
                wrong.append(f"methods.{name}: no allocator; write allocator: {{name: …}}")
            elif values["allocator"]["name"] == "full" and name == content.baseline:
                wrong.append(f"methods.{name}: full fine-tuning has no budget, so it cannot be the baseline")
            wrong += [f"methods.{name}: {problem}" for problem in _wrong_control(content, keys, values)]
            RunSections.model_validate(values)
        except ConfigError as error:
            wrong.append(f"methods.{name}: {error}")
        except ValidationError as error:
            wrong.append(explain(error, RunSections, f"methods.{name}"))
        else:
            made[name] = keys, values
    if wrong:
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(wrong)))
    return made


def _wrong_control(content: CompareFile, keys: MethodKeys, values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys of a control."""
    allocator, wrong = _allocator_of(values), []
    if keys.shuffled and keys.ranks_of is None:
        wrong.append("shuffled needs ranks_of, the method whose ranks are shuffled")
    if keys.ranks_of is not None:
        other = content.methods.get(keys.ranks_of) or {}
        if keys.ranks_of not in content.methods:
            wrong.append(f"ranks_of {keys.ranks_of!r} is not one of the methods {', '.join(content.methods)}")
        elif other.get("ranks_of") is not None or _allocator_of(other) == "full":
            wrong.append(
                f"ranks_of {keys.ranks_of!r} is itself a control, or has no ranks: name a method that moves ranks"
            )
        if allocator != "static" or keys.start is not None or keys.cut_at_end:
            wrong.append("ranks_of is for allocator: {name: static}, without start and cut_at_end")
    if keys.cut_at_end and (allocator != "static" or keys.start is None or keys.start == 1):
        wrong.append("cut_at_end is for allocator: {name: static}, with start above 1, such as start: 4")
    return wrong


def _allocator_of(values: Mapping[str, Any]) -> Any:
    section = values.get("allocator")
    return section.get("name") if isinstance(section, Mapping) else None


def _reserved_keys(changes: Mapping[str, Any]) -> list[str]:
    flat = set(_flat(changes))
    wrong = [f"{key} cannot differ between methods: set {instead}" for key, instead in RESERVED.items() if key in flat]
    shared = sorted({key.split(".")[0] for key in flat} & {"model", "task"})
    wrong += [f"{section} is the same for all methods: set it in the base" for section in shared]
    return wrong


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return found


def _yaml(value: Any) -> str:
    """A value as text for an override. Unlike str(), it keeps 1e-05 a number."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
