from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from lorank.cli.app import app
from lorank.experiments.planted import Scenario, make_problem, run_study
from lorank.experiments.planted import study as study_module
from lorank.experiments.planted.methods import GRID, METHODS, random, uniform
from lorank.experiments.planted.metrics import energy_found, gap_closed, mean_and_interval, rank_overlap
from lorank.experiments.planted.problem import last_hidden
from lorank.experiments.planted.student import lr_factor, train_student, updates_of
from lorank.experiments.planted.study import PlantedError, Row
from lorank.experiments.planted.table import closed_by_seed, rich_table, warning, write_results
from lorank.experiments.study.trials import StudyError
from lorank.lora import find_layers, make_peft_model, plan_for_rank, resize_

SIZES: dict[str, Any] = {
    **{"layers": 1, "most": 3, "block": 8, "train": 64, "held_out": 16, "scored": 4, "steps": 20, "batch": 8},
    **{"sized": "effect", "effect": 0.05, "largest": 5.0, "scaling": 1.0},
}
TINY = Scenario(**SIZES)
HEADS = Scenario(where="heads", **SIZES)


@pytest.mark.parametrize("scenario", [TINY, HEADS], ids=["modules", "heads"])
def test_what_is_planted_has_the_rank_the_size_and_the_place_that_it_says(scenario: Scenario) -> None:
    problem = make_problem(scenario, 0)
    assert len(problem.true) == (7 if scenario.where == "modules" else 4)
    assert set(problem.updates) == {name for name, rank in problem.true.items() if rank}
    assert problem.updates
    for name, update in problem.updates.items():
        assert torch.linalg.matrix_rank(update.double(), rtol=1e-5) == problem.true[name]
        heads = problem.true_heads.get(name, ())
        rows = update.view(len(heads), -1, update.shape[1]) if heads and "o_proj" not in name else None
        columns = update.view(update.shape[0], len(heads), -1) if heads and rows is None else None
        for head, rank in enumerate(heads):
            block = rows[head] if rows is not None else columns[:, head]  # type: ignore[index]
            assert torch.linalg.matrix_rank(block.double(), rtol=1e-5) == rank
    assert max(problem.relative_norms.values()) <= scenario.largest


@pytest.mark.parametrize("where", ["modules", "heads"])
def test_every_planted_rank_changes_its_weight_by_as_much(where: Any) -> None:
    scenario = dataclasses.replace(TINY, where=where, sized="weight")
    problem = make_problem(scenario, 0)
    for name, update in problem.updates.items():
        weight = problem.base.get_submodule(name).weight.detach()
        heads = problem.true_heads.get(name, (problem.true[name],))
        axis = 1 if "o_proj" in name else 0
        for own, change, rank in zip(
            weight.chunk(len(heads), axis), update.chunk(len(heads), axis), heads, strict=True
        ):
            expected = scenario.relative * own.norm() * math.sqrt(rank / scenario.most)
            torch.testing.assert_close(change.norm(), expected, rtol=1e-4, atol=1e-6)
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) == rank


def test_every_planted_rank_moves_the_logits_by_as_much() -> None:
    problem = make_problem(TINY, 0)
    tokens = problem.tokens["train"][:48]
    before = last_hidden(problem.base, tokens) @ problem.readout
    for name, update in problem.updates.items():
        model = copy.deepcopy(problem.base)
        model.get_submodule(name).weight.add_(update)
        change = last_hidden(model, tokens) @ problem.readout - before
        per_rank = change.square().sum() / before.square().sum() / problem.true[name]
        assert float(per_rank) == pytest.approx(TINY.effect**2, rel=0.02)


def test_the_loss_is_that_of_the_logits_and_one_for_the_base() -> None:
    problem = make_problem(TINY, 1)
    teacher = copy.deepcopy(problem.base)
    for name, update in problem.updates.items():
        teacher.get_submodule(name).weight.add_(update)
    tokens = problem.tokens["train"]
    with torch.no_grad():
        error = (problem.base(tokens).logits - teacher(tokens).logits).double().square().sum(-1).mean()
    assert float(error) == pytest.approx(problem.size, rel=1e-4)
    assert float(problem.loss(problem.base, problem.batch("train"))) == pytest.approx(1, rel=1e-5)
    assert float(problem.loss(teacher, problem.batch("test"))) < 1e-8


def test_the_exact_solution_has_no_loss_and_finds_everything() -> None:
    problem = make_problem(TINY, 0)
    targets = list(problem.true)
    model = make_peft_model(copy.deepcopy(problem.base), r=1, lora_alpha=TINY.scaling, target_modules=targets)
    layers = find_layers(model)
    resize_(layers, {name: plan_for_rank(0, rank) for name, rank in problem.true.items()})
    assert layers.total_rank == problem.budget
    with torch.no_grad():
        for name, update in problem.updates.items():
            U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
            rank = problem.true[name]
            layers[name].B.copy_(U[:, :rank] * S[:rank] / TINY.scaling)
            layers[name].A.copy_(Vh[:rank])
        assert float(problem.loss(model, problem.batch("test"))) < 1e-8
    for name, update in updates_of(layers, list(problem.updates)).items():
        assert energy_found(update, problem.updates[name], problem.roots[name]) == pytest.approx(1, abs=1e-5)


def test_the_parts_share_no_sample_of_one_split() -> None:
    problem = make_problem(TINY, 0)
    parts = [{tuple(row) for row in problem.tokens[part].tolist()} for part in ("validation", "selection")]
    assert not parts[0] & parts[1]
    assert {part: len(rows) for part, rows in problem.tokens.items()} == TINY.samples


@pytest.mark.parametrize("scenario", [TINY, HEADS], ids=["modules", "heads"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_within_the_true_budget(scenario: Scenario, name: str) -> None:
    problem, method = make_problem(scenario, 0), METHODS[name]
    assert len(method.grid) == GRID
    begins = method.ranks(problem)
    outcome = train_student(problem, begins, method.allocator(problem, method.knobs[-1]), lr=2e-3)
    if name in ("adalora", "sora", "ard"):
        assert sum(begins.values()) > problem.budget
        assert 0 < sum(outcome.ranks.values()) <= problem.budget
    else:
        assert sum(begins.values()) == sum(outcome.ranks.values()) == problem.budget
    assert math.isfinite(outcome.test)
    assert outcome.parameters[0] >= outcome.parameters[1] > 0


def test_yardsticks() -> None:
    problem = make_problem(TINY, 3)
    even = sorted(uniform(problem).values())
    assert even[-1] - even[0] <= 1
    assert random(problem) != random(make_problem(TINY, 4))
    assert METHODS["oracle"].ranks(problem) == problem.true


def test_a_student_is_the_same_again_and_learns() -> None:
    outcomes = []
    for _ in range(2):
        make_problem.cache_clear()
        torch.manual_seed(len(outcomes))  # nothing depends on the global state
        problem = make_problem(TINY, 5)
        method = METHODS["alora"]
        outcomes.append(train_student(problem, method.ranks(problem), method.allocator(problem, 8), lr=2e-3))
    first, second = ({**dataclasses.asdict(o), "seconds": 0, "scoring": 0} for o in outcomes)
    assert first == second
    assert first["test"] < 0.9


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    factors = [lr_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 6)
    assert max(factors) == factors[6] == 1
    assert factors[100] == 0


def test_shares_of_the_gap() -> None:
    assert gap_closed(0.5, uniform=1.0, oracle=0.0) == 0.5
    assert gap_closed(1.5, uniform=1.0, oracle=0.5) == -1
    assert gap_closed(0.2, uniform=0.5, oracle=0.3) == pytest.approx(1.5)
    assert math.isnan(gap_closed(0.5, uniform=0.3, oracle=0.3))


def test_overlap_of_ranks() -> None:
    assert rank_overlap({"a": 4, "b": 0, "c": 2}, {"a": 2, "b": 4, "c": 0}) == pytest.approx(2 / 6)
    assert rank_overlap({"a": 2, "b": 5}, {"a": 2, "b": 4}) == 1


def test_energy_found_of_cases_that_can_be_worked_out() -> None:
    e, one = torch.eye(4), torch.eye(4)
    planted = 3 * torch.outer(e[0], e[0]) + torch.outer(e[1], e[1])  # energies 9 and 1
    cases = [
        (torch.zeros(4, 4), 0.0),
        (7 * torch.outer(e[0], e[0]), 0.9),  # the larger part; its own size does not matter
        (-0.01 * torch.outer(e[1], e[1]), 0.1),
        (1e-3 * torch.outer(e[0], e[0]) + 50 * torch.outer(e[1], e[1]), 1.0),  # nor do sizes against each other
        (torch.outer(e[2], e[0]), 0.0),  # reads the right inputs, writes to the wrong place
        (torch.outer(e[0], e[2]), 0.0),
        (torch.outer(e[0] + e[2], e[0]), 0.45),  # half of the way
        (torch.outer(e[0], e[0]) * math.nan, 0.0),
    ]
    for update, share in cases:
        assert energy_found(update, planted, one) == pytest.approx(share, abs=1e-9)
    # an input that never occurs counts for nothing
    assert energy_found(torch.outer(e[1], e[1]), planted, torch.diag(torch.tensor([0.0, 1, 1, 1]))) == pytest.approx(1)


def test_mean_and_interval() -> None:
    mean, error, lower, upper = mean_and_interval([1.0, 3.0])
    assert (mean, error) == (2.0, 1.0)
    assert (lower, upper) == pytest.approx((1.075, 2.925))  # of the means 1, 2, 2, 3 of the four resamples
    assert mean_and_interval([2.0, 2.0, 2.0])[1:] == (0.0, 2.0, 2.0)
    assert math.isnan(mean_and_interval([5.0])[1])
    # of 10,000 resamples
    many = mean_and_interval(list(range(20)))
    picks = np.random.default_rng(0).integers(0, 20, (10_000, 20))
    assert many[2:] == pytest.approx(tuple(np.quantile(picks.mean(axis=1), [0.025, 0.975])))
    assert many[2] < many[0] == 9.5 < many[3]
    assert many == mean_and_interval(list(range(20)))


Calls = list[tuple[str, float, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What was really trained; grids are cut to two learning rates, of which one moves nothing."""
    made: Calls = []
    original = study_module.run_trial

    def counting(trial: study_module.Trial, device: str = "cpu") -> dict[str, Any]:
        made.append((trial.method, trial.lr, trial.seed))
        return original(trial, device)

    monkeypatch.setattr(study_module, "run_trial", counting)
    for name in ("uniform", "oracle"):
        monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], lrs=(2e-3, 1e-9)))  # type: ignore[arg-type]
    return made


def test_a_study_does_what_is_missing_and_no_more(calls: Calls, tmp_path: Path) -> None:
    def study(scenario: Scenario, methods: list[str]) -> list[Row]:
        calls.clear()
        return run_study(scenario, methods, tmp_path, seeds=[0], tuning_seeds=[9])

    first = study(TINY, ["uniform"])
    assert calls == [("uniform", 2e-3, 9), ("uniform", 1e-9, 9), ("uniform", 2e-3, 0)]
    tried = first[0].tuning
    assert tried[2e-3, None] < tried[1e-9, None] == pytest.approx(1, abs=0.3)
    assert study(TINY, ["uniform"]) == first
    assert calls == []
    more = study(TINY, ["uniform", "oracle"])
    assert calls == [("oracle", 2e-3, 9), ("oracle", 1e-9, 9), ("oracle", 2e-3, 0)]
    assert more[:1] == first
    # a line that an interruption cut short is run again
    file = tmp_path / "runs.jsonl"
    file.write_text(file.read_text()[:-20])
    assert study(TINY, ["uniform", "oracle"])[:1] == first
    assert calls == [("oracle", 2e-3, 0)]
    # other settings are other runs
    study(dataclasses.replace(TINY, steps=21), ["uniform"])
    assert len(calls) == 3
    assert len(file.read_text().splitlines()) == 9


@pytest.mark.parametrize("theirs", ['{"loss": 1}\n{"loss": 2}', "a line", '{"fingerprint": "a"}\n{"loss": 2}'])
def test_a_file_that_is_of_no_study_is_left_alone(theirs: str, calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text(theirs)
    with pytest.raises(StudyError, match=r"runs\.jsonl does not hold the runs of a study"):
        run_study(TINY, ["uniform"], tmp_path, seeds=[0], tuning_seeds=[9])
    assert (tmp_path / "runs.jsonl").read_text() == theirs
    assert calls == []


def test_a_table_that_is_of_no_study_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("mine")
    done = CliRunner().invoke(app, ["planted", "--out", str(tmp_path), "--methods", "uniform"])
    assert done.exit_code == 2, done.output
    assert "table.md would be replaced" in " ".join(done.stderr.split())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_method_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise PlantedError("every rank is off")

    monkeypatch.setattr(study_module, "train_student", failing)
    record = study_module.run_trial(study_module.Trial(TINY, "sora", 1e-2, 0.3, 0))
    assert (record["test"], record["failure"]) == (None, "PlantedError: every rank is off")
    rows = [*hand_made(), Row("sora", 1e-2, 0.3, {}, {0: record, 1: record})]
    assert closed_by_seed(rows[-1], rows) == {0: -math.inf, 1: -math.inf}
    text = write_results(rows, TINY, tmp_path)[0].read_text()
    assert "| SoRA (2 of 2 failed) |" in text
    assert "- failed: SoRA, seed 1: PlantedError: every rank is off" in text


def hand_made() -> list[Row]:
    """Two seeds of three methods. Uniform ranks (2, 2), true ones (4, 0)."""

    def run(test: float, ranks: tuple[int, int], energy: float) -> dict[str, Any]:
        return {
            **{"test": test, "failure": None, "budget": 4, "true": {"a": 4, "b": 0}, "energy": {"a": energy}},
            **{"ranks": dict(zip("ab", ranks, strict=True)), "parameters": [80, 40], "seconds": 2.0, "scoring": 0.5},
        }

    return [
        Row("uniform", 1e-2, None, {(1e-2, None): 0.9}, {0: run(0.9, (2, 2), 0.5), 1: run(0.7, (2, 2), 0.5)}),
        Row("oracle", 1e-2, None, {(1e-2, None): 0.1}, {0: run(0.1, (4, 0), 1.0), 1: run(0.2, (4, 0), 0.9)}),
        Row("ard", 1e-2, 0.1, {(1e-2, 0.1): 0.2}, {0: run(0.3, (3, 1), 0.8), 1: run(0.2, (4, 0), 0.6)}),
    ]


def test_tables_and_picture(tmp_path: Path) -> None:
    rows = hand_made()
    assert closed_by_seed(rows[0], rows) == {0: 0, 1: 0}
    assert closed_by_seed(rows[2], rows) == pytest.approx({0: 0.75, 1: 1.0})
    assert closed_by_seed(rows[2], rows[1:]) is None  # without the uniform yardstick there is no gap
    table, picture = write_results(rows, TINY, tmp_path)
    line = next(line for line in table.read_text().splitlines() if line.startswith("| ARD-LoRA |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:8] == ["87.5% ± 12.5%", "76% to 99%", "75%, 100%", "0.2500", "70.0%", "87.5%", "4.0"]
    assert cells[8:] == ["40", "2.0", "0.5", "0.01, alpha_lr 0.1"]
    assert imread(picture).ndim == 3
    assert rich_table(rows, TINY).row_count == 3
    assert [path.name for path in write_results(rows[1:], TINY, tmp_path)] == ["table.md"]


def test_the_picture_warns_of_few_seeds_and_few_steps() -> None:
    rows = hand_made()
    assert warning(rows, 60).startswith("Only 2 seeds of 60 steps")
    assert warning(rows, 2400).startswith("Only 2 seeds: ")
    for row in rows:
        row.runs[2] = row.runs[0]
    assert warning(rows, 60).startswith("Only 60 steps: ")
    assert warning(rows, 2400) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["lora"]}, "unknown method lora: expected some of uniform, oracle"),
        ({"methods": []}, "no method was given"),
        ({"seeds": [1, 9]}, "none in both"),
        ({"tuning_seeds": []}, "at least one of each"),
    ],
)
def test_wrong_studies_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"methods": ["uniform"], "seeds": [0], "tuning_seeds": [9], **changes}
    with pytest.raises(PlantedError, match=message):
        run_study(TINY, out=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    run = CliRunner(env={"COLUMNS": "200"})
    for arguments, message in (
        (["--methods", "nothing"], "unknown method nothing"),
        (["--seeds", "a,b"], "expected whole numbers"),
    ):
        done = run.invoke(app, ["planted", "--out", str(tmp_path / "new"), *arguments])
        assert done.exit_code == 2
        assert message in done.stderr


def test_a_quick_look_is_smaller_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stop(scenario: Scenario, methods: list[str], out: Path, **options: Any) -> Any:
        asked.update(options, steps=scenario.steps, methods=methods, out=out)
        raise PlantedError("that is all")

    monkeypatch.setattr(study_module, "run_study", stop)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["planted", "--quick", "--seeds", "5", "--out", str(tmp_path)])
    assert "A quick look, not a result" in done.stderr
    assert (asked["steps"], asked["seeds"], asked["tuning_seeds"]) == (400, [5], [100])
    assert {"uniform", "oracle"} < set(asked["methods"]) < set(METHODS)
    assert asked["out"] == tmp_path / "quick"
    rows = hand_made()
    assert "a quick look" in write_results(rows, TINY, tmp_path, quick=True)[0].read_text()
    assert "a quick look" not in write_results(rows, TINY, tmp_path)[0].read_text()
