"""Without an extra: the core works, and what needs the extra names it in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorank import LorankError
from lorank.cli.app import app
from lorank.config import make_config
from lorank.experiments.planted.metrics import mean_and_interval
from lorank.experiments.planted.table import picture
from lorank.extras import PACKAGES, MissingPackageError, require
from lorank.report import ranks_picture
from lorank.report.numbers import Frame, RunNumbers
from lorank.report.pareto import Point, pareto_picture
from lorank.tasks import load_rows, text_scores
from lorank.tasks.generation import GenerationTask
from tests import core_alone

ROOT = Path(__file__).parents[1]


def test_every_package_is_in_the_extra_that_its_message_names() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package in PACKAGES.values():
        assert package.name in [re.match(r"[\w-]+", line)[0] for line in extras[package.extra]]  # type: ignore[index]  # every line begins so


def test_the_message_names_packages_and_extras() -> None:
    for module in PACKAGES:
        require("a test", module)
    missing = dict.fromkeys(["typer", "scipy", "rich"])
    with pytest.MonkeyPatch.context() as patch:
        for module in missing:
            patch.setitem(sys.modules, module, None)  # type: ignore[arg-type]  # None: there is no such module
        with pytest.raises(MissingPackageError) as caught:
            require("lorank train", "typer")
        assert str(caught.value) == 'lorank train needs the package typer: pip install "lorank[cli]"'
        with pytest.raises(MissingPackageError) as caught:
            require("it", *PACKAGES)
        assert str(caught.value).endswith(
            'needs the packages rich and typer and scipy: pip install "lorank[cli,metrics]"'
        )
    assert issubclass(MissingPackageError, LorankError)
    assert issubclass(MissingPackageError, ImportError)


MINIMAL = {
    "model": {"name": "tiny"},
    "lora": {"r": 4, "alpha": "${lora.r}"},
    "task": {"name": "classification", "data": "rotten_tomatoes"},
    "allocator": {"name": "static"},
    "output_dir": "runs/x",
}


def heatmap(folder: Path) -> object:
    frame = Frame(0, {"layers.0.q": 1}, 8)
    return ranks_picture([RunNumbers("x", "LoRA", [frame], frame.ranks)], folder / "ranks.png")


def pareto(folder: Path) -> object:
    return pareto_picture([Point("a", 1, 1)], folder / "pareto.png", size="size", loss="loss")


@pytest.mark.parametrize(
    ("module", "use", "message"),
    [
        ("altair", heatmap, r'ranks_picture needs the package altair: pip install "lorank\[report\]"'),
        ("vl_convert", heatmap, "ranks_picture needs the package vl-convert-python"),
        ("matplotlib", pareto, "pareto_picture needs the package matplotlib"),
        ("matplotlib", lambda folder: picture([], folder / "gap.png", ""), "a study needs the package matplotlib"),
        (
            "sacrebleu",
            lambda _: text_scores(["a"], [["a"]]),
            r'needs the package sacrebleu: pip install "lorank\[metrics',
        ),
        ("rouge_score", lambda _: text_scores(["a"], [["a"]]), r"needs the package rouge-score: .*\[metrics"),
        ("scipy", lambda _: mean_and_interval(range(6)), r"more than 5 values needs the package scipy: .*\[metrics"),
        (
            "datasets",
            lambda _: load_rows("owner/name", "train"),
            r"'owner/name', .* needs the package datasets: .*\[cli",
        ),
        ("omegaconf", lambda _: make_config(MINIMAL), r"references \(\$\{…\}\) needs the package omegaconf: .*\[cli"),
    ],
)
def test_each_place_names_the_extra(
    module: str, use: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORANK_DATA", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]  # None: there is no such module
    with pytest.raises(MissingPackageError, match=message):
        use(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_generation_task_tells_before_training_that_its_metrics_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # type: ignore[arg-type]  # None: there is no such module
    task = GenerationTask.__new__(GenerationTask)  # training begins by asking for `test`
    with pytest.raises(MissingPackageError, match="BLEU and ROUGE-L of a generation task"):
        _ = task.test


@pytest.mark.parametrize(
    ("command", "package"),
    [(["demo"], "altair"), (["sweep", "any.yaml"], "matplotlib"), (["planted"], "matplotlib")],
)
def test_commands_that_draw_pictures_tell_it_before_they_begin(
    command: list[str], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]  # None: there is no such module
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, command)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f'Error: lorank {command[0]} needs the package {package}: pip install "lorank[report]"'
    ]
    assert not list(tmp_path.iterdir())


def test_a_sweep_needs_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)  # type: ignore[arg-type]  # None: there is no such module
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["sweep", "ard_ablation"])
    assert result.exit_code == 2
    assert result.stderr.strip() == 'Error: lorank sweep needs the package optuna: pip install "lorank[sweep]"'
    assert not list(tmp_path.iterdir())


def test_planted_with_many_seeds_needs_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # type: ignore[arg-type]  # None: there is no such module
    result = CliRunner(env={"COLUMNS": "400"}).invoke(
        app, ["planted", "--seeds", "0,1,2,3,4,5", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2
    assert "lorank planted with more than 5 seeds needs the package scipy" in result.stderr


def in_a_fresh_process(code: str, *hidden: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    program = f"from tests.core_alone import hide; hide(*{hidden!r}); {code}"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "hidden", "message"),
    [
        (("train", "any.yaml"), "typer", 'lorank train needs the package typer: pip install "lorank[cli]"'),
        (("--help",), "rich", 'lorank needs the package rich: pip install "lorank[cli]"'),
        (("score", "x"), "omegaconf", 'lorank score needs the package omegaconf: pip install "lorank[cli]"'),
    ],
)
def test_the_command_without_its_extra_prints_one_line(arguments: tuple[str, ...], hidden: str, message: str) -> None:
    done = in_a_fresh_process("from lorank.cli.main import main; main()", hidden, arguments=arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: {message}\n")


def test_runs_from_a_configuration_need_rich() -> None:
    done = in_a_fresh_process("import lorank.experiments", "rich")
    assert done.stderr.splitlines()[-1].endswith('lorank.experiments needs the package rich: pip install "lorank[cli]"')


def test_the_core_needs_none_of_the_packages(tmp_path: Path) -> None:
    others = ["pandas", "pyarrow", "PIL", "nltk", "trl", "deepspeed", "bitsandbytes", "torchao"]
    command = [sys.executable, core_alone.__file__, str(tmp_path), *PACKAGES, *others]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "a loop: 3 allocations" in done.stdout
    assert "the Trainer: resumed after 10 of 20 steps" in done.stdout
