"""A checkpoint that is not whole is recognised, whatever is missing of it, and the one before is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lorank
from lorank.training.checkpoint.integrity import SEAL, checkpoints, files_of_others, find_problem, remove_broken, seal
from tests.training.trainer_run import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, max_steps=4, save_steps=2).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_checkpoints_are_sealed_and_the_last_one_is_used(run: Path) -> None:
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert all((path / SEAL).is_file() and find_problem(path) is None for path in checkpoints(run))
    assert lorank.last_checkpoint(run) == str(run / "checkpoint-4")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint-4").iterdir())


@pytest.mark.parametrize("sealed", [True, False])
def test_an_incomplete_checkpoint_is_skipped(run: Path, sealed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Each file in turn is missing, or cut in half."""
    last, tried = run / "checkpoint-4", 0
    if not sealed:
        (last / SEAL).unlink()
    for name in names(run):
        whole = (last / name).read_bytes()
        needed = sealed or name not in ("README.md", "training_args.bin")
        for cut in (None, whole[: len(whole) // 2]):
            (last / name).unlink() if cut is None else (last / name).write_bytes(cut)
            expected = "checkpoint-2" if needed and not (name == SEAL and cut is None) else "checkpoint-4"
            if not sealed and name == "adapter_config.json" and cut is not None:
                expected = "checkpoint-4"  # without a seal nothing says how long a text should be
            found = lorank.last_checkpoint(run)
            assert found is not None
            assert Path(found).name == expected, (name, cut is None)
            (last / name).write_bytes(whole)
            tried += 1
    assert tried > 10
    assert "is not complete" in caplog.text


def test_a_changed_byte_breaks_the_seal(run: Path) -> None:
    path = run / "checkpoint-4" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert find_problem(path.parent) == "optimizer.pt has changed since it was written"


def test_a_seal_names_only_files_in_its_folder(run: Path) -> None:
    path = run / "checkpoint-4"
    (run / "outside").write_text("")
    (path / SEAL).write_text(json.dumps({"../outside": {}}))
    assert find_problem(path) == "../outside is missing"


def test_a_file_of_another_process_may_come_after_the_seal(run: Path) -> None:
    path = run / "checkpoint-4"
    (path / "rng_state_1.pth").write_bytes(b"half")
    seal(path)
    (path / "rng_state_1.pth").write_bytes(b"whole")
    assert find_problem(path) is None


def test_each_of_several_processes_has_a_random_state_of_its_own(run: Path) -> None:
    """Then there is no rng_state.pth. The process may be killed before the checkpoint is sealed."""
    path = run / "checkpoint-4"
    (path / SEAL).unlink()
    for index in range(2):
        (path / f"rng_state_{index}.pth").write_bytes((path / "rng_state.pth").read_bytes())
    (path / "rng_state.pth").unlink()
    assert lorank.last_checkpoint(run) == str(path)
    for index in range(2):
        (path / f"rng_state_{index}.pth").unlink()
    assert find_problem(path) == "rng_state.pth is missing"


def test_incomplete_checkpoints_are_removed_with_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    remove_broken(run)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    assert "checkpoint-4 is not complete (optimizer.pt is missing): it is removed" in caplog.text


def test_no_checkpoint(tmp_path: Path) -> None:
    assert lorank.last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("sealed", [True, False])
def test_a_broken_checkpoint_is_removed_without_the_files_of_others(run: Path, sealed: bool) -> None:
    last = run / "checkpoint-4"
    if not sealed:
        (last / SEAL).unlink()
    assert not files_of_others(last)
    (last / "optimizer.pt").unlink()
    for name in ("notes.txt", "deep/adapter_notes.txt"):
        (last / name).parent.mkdir(exist_ok=True)
        (last / name).write_text("mine")
    for _ in range(2):
        remove_broken(run)
        assert sorted(path.name for path in last.rglob("*")) == ["adapter_notes.txt", "deep", "notes.txt"]
        assert (last / "notes.txt").read_text() == "mine"
    assert lorank.last_checkpoint(run) == str(run / "checkpoint-2")
