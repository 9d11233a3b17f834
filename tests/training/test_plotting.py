"""The picture of a run in Python, and what is read out of its records."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import lorank
from lorank.errors import LorankError
from lorank.extras import MissingPackageError
from lorank.training.history import Record
from lorank.training.plotting import frames_of, numbers_of, plot
from tests.models import adapted, tiny_llama


def record(step: int = 0, **changes: Any) -> Record:
    ranks = changes.pop("ranks", {"a.0.q": 2, "a.0.v": 2})
    return Record(step, "StaticLoRA", ranks, {"a.0.q": (3, 3), "a.0.v": (3, 3)}, **changes)


def test_a_run_shows_its_ranks_in_python() -> None:
    model = adapted(tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ranks = lorank.attach(model, optimizer, lorank.StaticLoRA(), total_steps=2)
    chart = ranks.plot().to_dict()
    rows = next(iter(chart["datasets"].values()))
    assert {row["module"]: row["rank"] for row in rows} == ranks.layers.ranks
    assert chart["config"]["range"]["heatmap"]  # lorank's colours
    assert ranks.plot(show="change")._repr_mimebundle_() is not None  # notebooks show it
    with pytest.raises(LorankError, match="expected 'rank' or 'change'"):
        ranks.plot(show="all")  # type: ignore[arg-type]  # a mistake
    ranks.detach()


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)  # type: ignore[arg-type]  # None: there is no such module
    with pytest.raises(MissingPackageError, match=r"plot\(\) needs the package altair"):
        plot([record()])


def test_a_history_without_records_is_refused() -> None:
    with pytest.raises(LorankError, match="no record"):
        plot([])


def test_changes_are_counted_from_the_made_adapter_if_the_result_has_its_size() -> None:
    made = {"a.0.q": 2, "a.0.v": 2}
    pruned = record(5, ranks={"a.0.q": 4, "a.0.v": 0})
    wide = record(0, ranks={"a.0.q": 9, "a.0.v": 9})
    assert numbers_of([wide, pruned], made=made).changes == {"a.0.q": 2, "a.0.v": -2}
    assert numbers_of([wide, pruned]).changes == {"a.0.q": -5, "a.0.v": -9}
    assert numbers_of([wide, wide], made=made).reference_name == "the start of the run"


def test_ranks_that_are_switched_off_do_not_count_but_are_stored() -> None:
    (frame,) = frames_of([record(active={"a.0.q": 1, "a.0.v": 0})])
    assert frame.total == 1
    assert frame.parameters == 4 * 6


@pytest.mark.parametrize(
    "details",
    [
        {"budget": 3, "head_ranks": [1]},
        {"budget": {"percent": None, "parameters": {"used": 0, "limit": 5}}, "head_ranks": {"a.0.q": ["x"], "b": [1]}},
        {"budget": {"percent": {"used": 1, "limit": float("inf")}, "parameters": {"used": float("nan"), "limit": 1}}},
        {"budget": {"percent": {"used": "1"}}, "head_ranks": {"a.0.q": [], "a.0.v": [True]}},
    ],
)
def test_details_of_a_stranger_are_left_out_if_they_make_no_sense(details: dict[str, Any]) -> None:
    (frame,) = frames_of([record(details=details)])
    assert frame.limit is None
    assert frame.heads == {}
