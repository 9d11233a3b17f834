from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from lorank.experiments.job_environment import threads_per_job
from lorank.experiments.study.trials import Line, Progress, Results, StudyError, Wanted, run_trials
from tests.experiments.study.trivial import Note, all_of, note, notes

ROOT = Path(__file__).parents[3]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def done(folder: Path) -> Counter[str]:
    """How often each trial was begun and ended."""
    return Counter((folder / "notes").read_text().splitlines())


def test_the_plan_is_asked_after_every_result(tmp_path: Path) -> None:
    def plan(known: Mapping[str, Line]) -> Wanted:
        if len(known) < 2:
            return Wanted([Note("a1"), Note("a2"), Note("a1")], later=1, kinds=["b"])
        return Wanted([Note("a1"), Note("a2"), Note("b1")])

    told: list[Progress] = []
    results = Results(tmp_path / "new" / "results.jsonl")
    known = run_trials(plan, partial(note, folder=tmp_path), results, report=told.append)
    assert list(known) == ["a1", "a2", "b1"]
    assert [(p.done, p.total, p.last) for p in told] == [
        (0, 3, ""),
        (1, 3, "note a1"),
        (2, 3, "note a2"),
        (3, 3, "note b1"),
    ]
    assert [p.seconds_left for p in told] == [None, 4.0, 2.0, 0.0]
    assert run_trials(plan, partial(note, folder=tmp_path), results) == known
    assert max(done(tmp_path).values()) == 1


def test_a_cut_last_line_is_run_again(tmp_path: Path) -> None:
    work, results = partial(note, folder=tmp_path), Results(tmp_path / "results.jsonl")
    run_trials(partial(all_of, notes(3)), work, results)
    results.path.write_text(results.path.read_text()[:-9])
    assert list(results.read()) == ["n0", "n1"]
    run_trials(partial(all_of, notes(3)), work, results)
    assert [line["value"] for line in lines(tmp_path)] == ["n0", "n1", "n2"]
    assert done(tmp_path) == {
        **dict.fromkeys(["begin n0", "end n0", "begin n1", "end n1"], 1),
        "begin n2": 2,
        "end n2": 2,
    }


@pytest.mark.parametrize("theirs", ['{"loss": 1}\n', "a line", '{"fingerprint": "a"}\n{"loss": 2}'])
def test_a_file_of_something_else_is_left_alone(theirs: str, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(theirs)
    with pytest.raises(StudyError, match=r"results\.jsonl does not hold the runs of a study"):
        run_trials(partial(all_of, notes(1)), partial(note, folder=tmp_path), Results(tmp_path / "results.jsonl"))
    assert (tmp_path / "results.jsonl").read_text() == theirs
    assert not (tmp_path / "notes").exists()


def test_a_damaged_line_is_told(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"fingerprint": "a", "b\n{"fingerprint": "b"}\n')
    with pytest.raises(StudyError, match="is damaged"):
        Results(tmp_path / "results.jsonl").read()


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    with results.locked(), pytest.raises(StudyError, match="another process is adding to"):
        run_trials(partial(all_of, notes(1)), partial(note, folder=tmp_path), Results(results.path))


def test_jobs_have_their_cores_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = threads_per_job(1)
    assert threads_per_job(2) == max(1, cores // 2)
    assert threads_per_job(10**6) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_per_job(1) == 1
    work = partial(note, folder=tmp_path, pause=0.3)
    results = Results(tmp_path / "results.jsonl")
    known = run_trials(partial(all_of, notes(6)), work, results, jobs=2, devices=["3", "5"])
    assert len({line["pid"] for line in known.values()} - {os.getpid()}) == 2
    assert {line["device"] for line in known.values()} == {"3", "5"}
    assert {line["threads"] for line in known.values()} == {"1"}
    assert done(tmp_path) == {f"{what} n{i}": 1 for i in range(6) for what in ("begin", "end")}


def test_what_a_job_raises_ends_the_study_and_keeps_the_rest(tmp_path: Path) -> None:
    trials = [Note("n0"), Note("n1", then="raise")]
    for jobs in (1, 2):
        with pytest.raises(ValueError, match="cannot do n1") as caught:
            run_trials(
                partial(all_of, trials),
                partial(note, folder=tmp_path, pause=0.2 * (jobs - 1)),
                Results(tmp_path / "results.jsonl"),
                jobs=jobs,
            )
        if jobs == 2:
            assert "in the process of note n1" in str(caught.value.__cause__)
    assert [line["value"] for line in lines(tmp_path)] == ["n0"]


def test_a_killed_job_is_begun_again_once(tmp_path: Path) -> None:
    work, results = partial(note, folder=tmp_path), Results(tmp_path / "results.jsonl")
    known = run_trials(partial(all_of, [Note("n0", then="kill once"), Note("n1")]), work, results, jobs=2)
    assert set(known) == {"n0", "n1"}
    assert done(tmp_path)["begin n0"] == 2
    with pytest.raises(StudyError, match="that ran note n2 was killed, twice"):
        run_trials(partial(all_of, [Note("n2", then="kill")]), work, results, jobs=2)
    assert done(tmp_path)["begin n2"] == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_survives_a_kill(jobs: int, tmp_path: Path) -> None:
    """Killed in the middle, with SIGKILL: no run is lost, none is done twice, and no process goes on alone."""
    command = [sys.executable, "-m", "tests.experiments.study.trivial", str(tmp_path), "12", str(jobs)]
    study = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "results.jsonl").exists() or len(lines(tmp_path)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        study.send_signal(signal.SIGKILL)
        study.wait()
    finished = [str(line["value"]) for line in lines(tmp_path)]
    assert len(finished) < 12
    time.sleep(0.5)  # longer than a trial takes
    begun = done(tmp_path)
    time.sleep(0.3)
    assert done(tmp_path) == begun, "an orphan went on"
    subprocess.run(command, cwd=ROOT, check=True)
    assert sorted(str(line["value"]) for line in lines(tmp_path)) == sorted(f"n{i}" for i in range(12))
    # a trial that was finished was not begun again; one that was running at the kill was
    assert all(done(tmp_path)[f"begin {name}"] == 1 for name in finished)
    assert sum(count for what, count in done(tmp_path).items() if what.startswith("begin")) <= 12 + jobs
