"""A file with scores: `lorank score --out` writes it, `lorank prune --scores` reads it in place of scoring anew.

It holds a hash of the adapter's weights: scores of another adapter, or of another state of it, are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lorank.experiments.adapter_session import LoadedAdapter
from lorank.experiments.errors import SettingsError
from lorank.experiments.scores import By, Scored, Terms
from lorank.files import parse_json, read_bounded
from lorank.lora.basis import Basis
from lorank.scoring import Balanced
from lorank.training.summary import by_projection

SCORES_BEGIN = b'{\n  "adapter": '
"""The first bytes of a file with scores."""
MAX_BYTES = 2_000_000_000


def check_scores_file(out: Path) -> None:
    """Checks, before anything slow begins, that the scores may be written to `out`.

    Raises:
        SettingsError: `out` is a folder, or a file that does not hold scores.
    """
    if not out.exists():
        return
    if out.is_dir():
        raise SettingsError(f"--out {out} is a folder: name a file, e.g. {out / 'scores.json'}")
    with out.open("rb") as file:
        theirs = not file.read(len(SCORES_BEGIN)).startswith(SCORES_BEGIN)
    if theirs:
        raise SettingsError(f"--out {out} exists and does not hold scores: name another file, or remove this one first")


def scores_json(loaded: LoadedAdapter, scored: Scored) -> dict[str, Any]:
    """The content of a file with scores: JSON-serialisable.

    ``scores`` are those that `prune` compares; ``delta_loss`` is what the loss rises by without each rank, and
    ``projections`` its sums. By `balanced`, ``bases`` has the matrix of every module's basis and its inverse.
    """
    values: dict[str, Any] = {
        "adapter": str(loaded.adapter),
        "weights": weights_hash(loaded.adapter),
        "model": loaded.config.model.name,
        "data": loaded.config.task.data,
        "by": scored.by,
        "terms": scored.terms,
        "basis": "balanced" if scored.balanced else "as trained",
        "samples": scored.samples,
        "loss": scored.loss,
        "seconds": scored.seconds,
        "scores": _lists(scored.scores),
    }
    if scored.without is not None:
        values["delta_loss"] = _lists(scored.without)
        values["projections"] = projection_sums(scored.without)
    if scored.alone is not None:
        values["gain_alone"] = _lists(scored.alone)
    if scored.balanced is not None:
        values["bases"] = {
            name: [one.basis.matrix.tolist(), one.basis.inverse.tolist()] for name, one in scored.balanced.items()
        }
    return values


def read_scores(path: Path, loaded: LoadedAdapter) -> Scored:
    """Reads a file with scores of this adapter.

    Raises:
        SettingsError: the file cannot be read, holds no scores, or those of another adapter.
    """
    try:
        values = parse_json(read_bounded(path, MAX_BYTES))
        scores = {name: _row(row) for name, row in values["scores"].items()}
        by, terms, samples = values["by"], values.get("terms", "both"), values["samples"]
        loss, seconds = float(values["loss"]), float(values["seconds"])
        if by not in get_args(By) or terms not in get_args(Terms) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"by is {by!r}, terms {terms!r}, samples {samples!r}")
        balanced = None
        if by == "balanced":
            bases = {name: Basis(_square(one[0]), _square(one[1])) for name, one in values["bases"].items()}
            balanced = {name: Balanced(worth, bases[name]) for name, worth in scores.items()}
        weights = values["weights"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"--scores {path}: it cannot be read as scores ({type(error).__name__}: {error}). Make it anew: lorank "
            f"score {loaded.adapter} --out {path}"
        ) from error
    fits = {name: len(values) for name, values in scores.items()} == dict(loaded.layers.ranks)
    if not fits or weights != weights_hash(loaded.adapter):
        raise SettingsError(
            f"--scores {path} are of {values.get('adapter')}, whose weights are not those of {loaded.adapter}. Score "
            f"this adapter: lorank score {loaded.adapter} --out FILE"
        )
    return Scored(scores, by, samples, loss, seconds, balanced, terms)


def projection_sums(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Scores summed over the ranks of all modules of a projection, the highest first."""
    sums = by_projection({name: {"sum": float(values.sum())} for name, values in scores.items()})  # type: ignore[dict-item]
    return dict(sorted(((name, own["sum"]) for name, own in sums.items()), key=lambda one: -one[1]))


def weights_hash(adapter: Path) -> str:
    """SHA-256 of the file with an adapter's weights."""
    files = sorted(adapter.glob("adapter_model.*"))
    digest = hashlib.sha256()
    for file in files[:1]:
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def _lists(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: one.tolist() for name, one in values.items()}


def _row(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1)  # (r,)


def _square(values: Any) -> Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    return found if found.dim() == 3 else found.reshape(len(values), len(values))  # (r, r), or (E, r, r) for experts


def dump(values: Mapping[str, Any]) -> str:
    """The text of a file with scores."""
    return json.dumps(values, indent=2) + "\n"
