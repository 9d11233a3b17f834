"""The page of the suite says what is in its files, and puts methods together over tasks as it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite
from benchmarks.suite_ranks import agreement

pytestmark = pytest.mark.filterwarnings("ignore")


RANKS = {"0.q": 1, "0.up": 4, "1.q": 0, "1.up": 3}


def row(method: str, mean: float, **more: Any) -> dict[str, Any]:
    given = {"p": 0.5, "real": False, "k": 1.0, "reference": None, "sized": True, "seconds": 10.0, **more}
    return {
        **{"method": method, "title": method, "budget": "2", "mean": mean, "stderr": 0.1, "lr": 0.01, "notes": []},
        **{"lr_grid": {"0.005": mean + 1, "0.01": mean}, "parameters": 100, "most_parameters": 200},
        **{key: given[key] for key in ("reference", "sized", "seconds")},
        **{key: more.get(key) for key in ("untrained_loss", "other_loss", "other_loss_before")},
        "equivalent_k": given["k"],
        "difference": None if method == "LoRA" else {"mean": mean - 3, "p": given["p"], "real": given["real"]},
    }


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir()
    result = {"metric": "loss", "higher_is_better": False, "budgets": ["2"], "rows": rows, "sentence": f"About {name}."}
    (folder / name / "comparison.json").write_text(json.dumps(result))
    lines = [
        {"method": method, "budget": "2", "stage": stage, "seconds": 1800 / 4, "seed": seed, "ranks": ranks}
        for seed in (0, 1)
        for method, ranks in (("LoRA", dict.fromkeys(RANKS, 2)), ("ours", {**RANKS, "0.up": 2 + seed}))
        for stage in ("tuning", "test")
    ]
    (folder / name / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    twice = {"reference": 2.0, "real": True}
    for name, gain, k in (("first", 0.5, 2.0), ("second", 0.25, 0.5)):
        full = row("all", 1.0, sized=False, untrained_loss=5.0)
        rows = [
            row("LoRA", 3.0),
            row("ours", 3.0 - gain, p=0.008, k=k),
            row("theirs", 3.5, p=0.03, k=None, seconds=30.0),
        ]
        rows[1] |= {"other_loss": 2.5, "other_loss_before": 2.0}
        once = [row("once", 1.5, p=1.0)] if name == "first" else []  # the other task lacks it, so it takes no place
        write(tmp_path, name, [*rows, *once, full, row("LoRA × 2", 2.0, **twice)])
    write(tmp_path, "flat", [row("LoRA", 3.0), row("ours", 9.0, p=1e-6), row("LoRA × 2", 3.0, reference=2.0)])
    return tmp_path


def test_holm() -> None:
    found = suite.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert suite.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_tasks_are_put_together(folder: Path) -> None:
    tasks = {task.name: task for task in suite.read(folder)}
    assert [name for name, task in tasks.items() if task.separates] == ["first", "second"]
    first, second = tasks["first"], tasks["second"]
    assert first.places(["LoRA", "ours", "theirs"]) == {"LoRA": 2, "ours": 1, "theirs": 3}
    assert first.places(first.methods) == {"LoRA": 3, "ours": 2, "theirs": 4, "once": 1}
    assert first.share_of_full(first.methods["ours"]) == pytest.approx((5 - 2.5) / (5 - 1))
    assert suite.mean_k([first, second], "ours") == pytest.approx(math.sqrt(2 * 0.5))
    assert suite.mean_k([first, second], "theirs") is None
    # five cells in all: 0.008 · 5, 0.008 · 5 (not below the one before), 0.03 · 3
    found = suite.corrected([first, second])
    assert found["first", "ours"] == pytest.approx(0.04)
    assert found["second", "theirs"] == pytest.approx(0.09)


def test_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.main([str(folder)])
    assert "from 3 comparisons" in capsys.readouterr().out
    text = (folder / "index.md").read_text(encoding="utf-8")
    assert "24 runs on 3 tasks, 3.0 hours" in text
    assert "| ours | 0.31 | 1.69 |" in text  # q: 1, 0, 1, 0; up: 2, 3, 3, 3; the mean of all is 1.625
    assert "| ours | 0.95 |" in text  # order of ranks 1, 2, 0, 3 and 1, 3, 0, 3
    assert "flat: more parameters are not always better." in text
    assert "| method | first | second | flat (not counted) | mean place | k |" in text
    assert "| ours | **-0.5000 (2.0)** | **-0.2500 (0.5)** | *+6.0000 (1.0)* | 1.0 | 1.00 |" in text
    assert "| theirs | +0.5000 | +0.5000 |  | 3.0 |  |" in text
    assert "| once | -1.5000 (1.0) |  |  |  |  |" in text
    assert "| ours | 2.0 | 59.4% | +0.500 |" in text
    assert "| first | 3.0000 | 2.0000 | 1.0000 | 5.0000 |" in text
    assert "- [flat](flat/table.md): About flat." in text
    for name in ("capacity.png", "rates.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_every_budget_of_a_comparison_counts(folder: Path) -> None:
    path, lines = folder / "first" / "comparison.json", folder / "first" / "results.jsonl"
    result = json.loads(path.read_text())
    wider = [{**one, "budget": "4", "mean": one["mean"] - 0.5} for one in result["rows"]]
    path.write_text(json.dumps({**result, "budgets": ["2", "4"], "rows": [*result["rows"], *wider]}))
    one = {"method": "LoRA", "budget": "4", "stage": "test", "seconds": 3600.0, "seed": 0, "ranks": RANKS}
    lines.write_text(lines.read_text() + json.dumps(one) + "\n")
    tasks = suite.read(folder)
    assert [task.name for task in tasks] == ["first, 2", "first, 4", "second", "flat"]
    assert [task.methods["LoRA"]["mean"] for task in tasks[:2]] == [3.0, 2.5]
    assert [len(task.lines) for task in tasks[:2]] == [8, 1]
    text = suite.page(tasks)
    assert "25 runs on 3 tasks, 4.0 hours" in text
    assert "| method | first, 2 | first, 4 | second | flat (not counted) |" in text
    assert text.count("(first/table.md)") == 1


def test_a_task_on_which_half_is_better_does_not_separate_sizes(folder: Path) -> None:
    path = folder / "first" / "comparison.json"
    result = json.loads(path.read_text())
    for half, separates in ((2.9, False), (3.1, True)):
        rows = [*result["rows"], row("LoRA × 0.5", half, reference=0.5)]
        path.write_text(json.dumps({**result, "rows": rows}))
        assert {task.name: task.separates for task in suite.read(folder)}["first"] is separates


def test_agreement_of_ranks() -> None:
    one, other = {"a": 1, "b": 2, "c": 3}, {"a": 3, "b": 2, "c": 1}
    assert agreement([one, one, other]) == pytest.approx((1 - 1 - 1) / 3)
    assert agreement([one], [other]) == pytest.approx(-1)
    assert agreement([one, dict.fromkeys(one, 2)]) is None


def test_an_empty_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main([str(tmp_path)])
    assert "run `lorank compare suite/TASK` first" in capsys.readouterr().err
