"""Error messages for a configuration: the dotted path, the given value, the nearest known key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lorank.errors import LorankError
from lorank.tasks.known import nearest_name

OTHER_NAMES = {
    "batch": "batch_size",
    "dataset": "data",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr_scheduler_type": "scheduler",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "batch_size",
    "rank": "r",
    "save_total_limit": "keep_checkpoints",
    "warmup_ratio": "warmup",
}
"""Names that transformers and PEFT use for lorank's keys. A message suggests lorank's key; the name is not accepted."""


MAX_LINES, MAX_LINE = 40, 400


class ConfigError(LorankError):
    """A configuration cannot be read, or has unknown keys or wrong values; the message lists all of them."""


def explain(error: ValidationError, root: type[BaseModel], source: str, values: Mapping[str, Any] | None = None) -> str:
    """The message for all errors that pydantic found: one line per error, in the order of the file.

    Args:
        error: pydantic's error.
        root: the class that describes the whole file.
        source: the name of the file or of another source; the message begins with it.
        values: the values with the errors. If their data set has nearly the name of a known one, the message begins
            with it: a known data set sets further keys, which are missing otherwise.
    """
    if near := nearest_data((values or {}).get("task")):
        given = (values or {})["task"]["data"]
        return f"{source}: task.data: {given!r} is no known data set; did you mean {near}?"
    # without pydantic's links to its own documentation, which do not help the user
    details = error.errors(include_url=False)
    lines = [_short(_line(detail, root)) for detail in details[:MAX_LINES]]
    lines += ["…"] if len(details) > MAX_LINES else []
    count = f"{len(details)} error{'s' if len(details) > 1 else ''}"
    return f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines)


def nearest_data(task: Any) -> str | None:
    """The known data set whose name is nearly that of a task's data; None: there is none, or the data may exist."""
    data = task.get("data") if isinstance(task, Mapping) else None
    return nearest_name(data) if isinstance(data, str) else None


def _short(text: str) -> str:
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 60]} … {text[-40:]}"


def _line(detail: Any, root: type[BaseModel]) -> str:
    path, model = _walk(detail["loc"], root)
    where = ".".join(path) or "(top level)"
    kind = detail["type"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_suggest(path, model, root)}"
    if kind == "missing":
        return f"{where}: is missing{_described(path, model)}"
    if kind == "union_tag_not_found":
        return f"{where}.name: is missing, expected one of {', '.join(_names(root, path[-1]))}"
    if kind == "union_tag_invalid":
        names = _names(root, path[-1])
        given = detail["ctx"]["tag"]
        return f"{where}.name: {given!r} is not one of {', '.join(names)}{_nearest(given, names)}"
    if kind == "value_error":
        return f"{where}: {detail['ctx']['error']}"
    return f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]}, given {detail['input']!r}"


def _walk(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted path without the tags that pydantic adds for unions, and the model that has its last key."""
    path: list[str] = []
    holder: type[BaseModel] | None = None
    choices = [root]
    for part in loc:
        if len(choices) > 1 and (tagged := [choice for choice in choices if _tag(choice) == part]):
            choices = tagged
            continue
        holder = choices[0] if len(choices) == 1 else None
        path.append(str(part))
        field = holder.model_fields.get(str(part)) if holder else None
        choices = list(_models(field.annotation)) if field else []
    return path, holder


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _tag(model: type[BaseModel]) -> str | None:
    name = model.model_fields.get("name")
    values = get_args(name.annotation) if name else ()
    return values[0] if values else None


def _names(root: type[BaseModel], section: str) -> list[str]:
    return [tag for model in _models(root.model_fields[section].annotation) if (tag := _tag(model))]


def _all_keys(root: type[BaseModel]) -> dict[str, str]:
    """Every key of the file, with its variant if the section has several variants (`task.name=generation`)."""
    keys: dict[str, str] = {}
    for section, field in root.model_fields.items():
        keys[section] = ""
        for model in _models(field.annotation):
            owner = f" of {section}.name={_tag(model)}" if _tag(model) else ""
            for key in model.model_fields:
                keys.setdefault(f"{section}.{key}", owner)
    return keys


def known_key(name: str, root: type[BaseModel]) -> str | None:
    """The dotted key that is meant by a dotted key, or by the name of a key alone, also by transformers' and PEFT's.

    Args:
        name: `training.lr`, `lr` or `learning_rate`.
        root: the class that describes the whole file.

    Returns:
        The key, `training.lr`; None: there is no such key. Keys of an allocator are not known here, and returned as
        they are.
    """
    keys = _all_keys(root)
    section, dot, leaf = name.rpartition(".")
    leaf = OTHER_NAMES.get(leaf, leaf)
    if dot:
        return f"{section}.{leaf}" if f"{section}.{leaf}" in keys or section == "allocator" else None
    if leaf in keys:
        return leaf
    return next((key for key in keys if key.rpartition(".")[2] == leaf and key.count(".") == 1), None)


def _suggest(path: Sequence[str], model: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """Suggests the key that the user probably meant: of another variant, of another section, or with a similar name."""
    keys = _all_keys(root)
    if owner := keys.get(".".join(path)):
        return f" here; it is a key{owner}"
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys)}  # the first key of each name wins
    meant = OTHER_NAMES.get(path[-1], path[-1])
    if meant in leaves:
        return f"; did you mean {leaves[meant]}?"
    siblings = list(model.model_fields) if model else []
    if near := get_close_matches(path[-1], siblings, n=1):
        return f"; did you mean {'.'.join([*path[:-1], near[0]])}?"
    if near := get_close_matches(path[-1], [leaf for leaf, key in leaves.items() if not keys[key]], n=1):
        return f"; did you mean {leaves[near[0]]}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _nearest(given: Any, names: Sequence[str]) -> str:
    near = get_close_matches(str(given), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _described(path: Sequence[str], model: type[BaseModel] | None) -> str:
    field = model.model_fields.get(path[-1]) if model else None
    return f" ({' '.join(field.description.split())})" if field and field.description else ""
