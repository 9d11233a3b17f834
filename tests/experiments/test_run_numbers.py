"""What a report reads: finished runs, runs of other loops, comparisons, and folders that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorank.errors import LorankError
from lorank.experiments.errors import SettingsError
from lorank.experiments.folder import remove_run
from lorank.experiments.report_sources import Source, find_sources
from lorank.experiments.run_numbers import read_comparison, read_run
from lorank.experiments.run_report import Report, check_out
from lorank.experiments.time_left import duration
from lorank.report.comparison import compare_runs
from lorank.report.page import comparison_figures
from lorank.training.history import HistoryError
from tests.experiments.run_folders import records, write_history, write_run
from tests.report.runs import NAMES, made_run


def read(folder: Path) -> Any:
    (source,), _ = find_sources([folder])
    return read_run(source)


def test_everything_about_a_finished_run_is_read(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "mine"))
    assert run.name == "mine"
    assert run.method == "BalancedLoRA"
    assert run.reference_name == "the adapter as it was made"
    assert run.reference == dict.fromkeys(NAMES, 4)
    assert run.validation == [(20, 4.1), (40, 3.25)]
    assert len(run.losses) == 8
    assert run.steps == 40
    assert run.worth.scores == made_run().worth.scores
    asked, came_out, cost = dict(run.asked), dict(run.came_out), dict(run.cost)
    assert asked["method"] == "BalancedLoRA (cuts 5)"  # only what is not the default
    assert asked["adapter"] == "rank 4, alpha 8"
    assert came_out["validation loss"] == "5.5000 → 3.2500"
    assert came_out["test bleu"] == "20.0000"
    assert came_out["budget used"] == "98 of 100 % of the adapter as it was made"
    assert cost["training"] == "1 min 40 s, of which scoring 4 s (4.0%)"
    assert cost["files of the adapter"] == "2 kB"
    assert (run.quality.metric, run.quality.value, run.quality.seed) == ("test loss", 3.5, 0)
    last = records()[-1]
    assert run.last.limit == pytest.approx(last.parameters / 0.98)
    assert run.notes == ()


def test_a_folder_of_any_loop_needs_its_history_only(tmp_path: Path) -> None:
    run = read(write_history(tmp_path / "loop").parent)
    assert run.reference_name == "the start of the run"
    assert run.losses == run.validation == []
    assert run.quality is None
    assert dict(run.cost)["scoring and moving ranks"] == "2 s"


def test_the_losses_of_the_trainer_come_from_its_newest_checkpoint(tmp_path: Path) -> None:
    write_history(tmp_path)
    for step in (9, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        log = [{"step": step, "loss": 1.0}, {"step": step, "eval_loss": float("nan")}, "junk"]
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    run = read(tmp_path)
    assert run.losses == [(20, 1.0)]
    assert run.validation == []


def test_changes_are_counted_from_the_start_where_the_result_has_another_size(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "wide", config={"lora": {"r": 16}}))
    assert run.reference_name == "the start of the run"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "log_history.jsonl", "curve.json"])
@pytest.mark.parametrize("content", [b"{{{{", b"\xff\xfe\x00", b"[[1, 2]]", b'{"a": "b"}'])
def test_damaged_files_are_left_out_and_named(name: str, content: bytes, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    run = read(folder)
    assert run.last.ranks == made_run().last.ranks
    if content in (b"{{{{", b"\xff\xfe\x00"):
        assert any(note.startswith(f"{name} cannot be read") for note in run.notes)


def test_a_run_without_metrics_is_called_unfinished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.json").unlink()
    run = read(folder)
    assert "not finished" in run.notes[0]
    assert (run.quality.metric, run.quality.value) == ("validation loss", 3.25)


def test_the_rank_curve_beside_a_run_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    points = [{"parameters": 100, "loss": 4.0}, {"parameters": 200, "loss": 3.0}]
    (tmp_path / "run_curve").mkdir()
    curve = {"data": "e2e_nlg", "samples": 8, "points": points, "knee": points[0]}
    (tmp_path / "run_curve" / "curve.json").write_text(json.dumps(curve))
    assert read(folder).curve.points == [(100, 4.0), (200, 3.0)]
    assert read(folder).curve.knee == (100, 4.0)


def test_seeds_of_one_recipe_are_compared_as_one(tmp_path: Path) -> None:
    for seed, loss in enumerate((3.5, 3.6, 3.7)):
        write_run(tmp_path / "all" / f"seed{seed}", seed=seed, loss=loss)
    write_run(tmp_path / "all" / "other", loss=3.0, config={"lora": {"r": 5}})
    sources, _ = find_sources([tmp_path / "all"])
    (found,) = compare_runs([read_run(source) for source in sources])
    assert [(one.label, len(one.values)) for one in found.groups[""]] == [("other", 1), ("BalancedLoRA: 3 seeds", 3)]


def test_a_comparison_is_read_and_a_damaged_one_named(tmp_path: Path) -> None:
    row = {"method": "lora", "title": "LoRA", "budget": 4, "lr": 0.01, "seeds": [0, 1, 2], "values": [3.0, 3.1, 3.2]}
    better = {
        **{"method": "balanced", "title": "BalancedLoRA", "budget": 4, "lr": 0.02, "seeds": [0], "values": [2.0]},
        **{
            "difference": {"mean": -1.0, "low": -1.2, "high": -0.8, "p": 0.001},
            "equivalent_k": 2.5,
            "sentence": "Real.",
        },
    }
    path = tmp_path / "comparison.json"
    values = {"task": "e2e", "metric": "test loss", "rows": [row, better, "junk", {"title": "no values"}]}
    path.write_text(json.dumps({**values, "sentence": "BalancedLoRA wins."}))
    found = read_comparison(path)
    lora, balanced = found.groups["4"]
    assert (lora.label, lora.mean) == ("LoRA", pytest.approx(3.1))
    assert balanced.more["difference"] == "-1.0000 (-1.2000 to -0.8000)"
    assert balanced.more["as LoRA with k times the parameters"] == "2.5"
    assert balanced.note == "Real."
    assert "fewer than 3 seeds" in found.warning
    assert [one.name for one in find_sources([tmp_path])[1]] == ["comparison.json"]
    for text, message in (("{", "cannot be read"), ('{"rows": []}', "no finished row"), ("[]", "no finished row")):
        path.write_text(text)
        with pytest.raises(LorankError, match=message):
            read_comparison(path)


def test_sources_have_the_shortest_names_that_tell_them_apart(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "b/other"):
        write_history(tmp_path / name)
    assert [s.name for s in find_sources([tmp_path / "a" / "run", tmp_path / "b" / "run"])[0]] == ["a/run", "b/run"]
    assert [s.name for s in find_sources([tmp_path / "b"])[0]] == ["other", "run"]
    assert len(find_sources([tmp_path, tmp_path / "a", tmp_path / "a/run/rank_history.jsonl"])[0]) == 3


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_a_history_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"Give the folder of a run"):
        find_sources([tmp_path / name])


def test_a_history_without_a_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rank_history.jsonl").write_text("")
    with pytest.raises(HistoryError, match="holds no record yet"):
        read_run(Source("x", tmp_path / "rank_history.jsonl", tmp_path))


def test_a_users_own_page_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("<html>mine</html>")
    with pytest.raises(SettingsError, match="is no report of lorank"):
        check_out(path, overwrite=False)
    check_out(path, overwrite=True)
    Report([made_run()], []).write_page(path)
    check_out(path, overwrite=False)
    with pytest.raises(SettingsError, match="is a folder"):
        check_out(tmp_path, overwrite=True)


def test_the_numbers_are_json(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "run"))
    found = json.loads(json.dumps(Report([run], compare_runs([run])).to_dict(), allow_nan=False))
    assert found["runs"][0]["allocations"][-1]["ranks"] == dict(run.last.ranks)
    assert found["runs"][0]["summary"].startswith("BalancedLoRA pruned 6 and added 6 ranks in 3 allocations")


def test_overwriting_a_run_removes_its_log_and_its_picture_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "ranks.png").write_bytes(b"")
    remove_run(folder)
    assert list(folder.iterdir()) == []


def test_a_comparison_in_which_everything_diverged_is_still_shown(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    row = {"title": "LoRA", "values": [float("inf")], "parameters": float("inf")}
    path.write_text(json.dumps({"rows": [row, {**row, "title": "ALoRA"}]}))
    (figure,) = comparison_figures(read_comparison(path))
    assert json.dumps(figure.chart.to_dict(), allow_nan=False)


def test_durations() -> None:
    assert [duration(s) for s in (0.31, 42.4, 363, 7500, float("nan"))] == [
        *("0.31 s", "42 s", "6 min 3 s", "2 h 5 min", "unknown")
    ]
