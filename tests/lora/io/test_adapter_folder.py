"""A new adapter replaces an adapter's own files, and nothing else in the folder is touched, also by an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lorank.errors import AdapterError
from lorank.files import WriteError
from lorank.lora import LayerPlan, find_layers, load_adapter, read_adapter_config, resize_, save_adapter
from lorank.lora.io import adapter_folder
from lorank.lora.io.adapter_folder import NEW_ADAPTER, is_adapter_file, replacing_adapter
from tests.models import adapted, tiny_llama, token_batch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD = {CONFIG: "old settings", WEIGHTS: "old weights", "adapter_model.bin": "older weights"}
THEIRS = {
    "checkpoint-4/adapter_config.json": "{}",
    "tokenizer.json": "{}",
    "README.md": "my own words",
    ".thesis.12.part": "years of work",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replace(folder: Path) -> None:
    with replacing_adapter(folder) as staged:
        write(staged, {CONFIG: "new settings", WEIGHTS: "new weights", "README.md": "a model card"})


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


NEW = {CONFIG: "new settings", WEIGHTS: "new weights"}


def test_beside_other_files_only_the_adapters_own_files_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, {**OLD, **THEIRS, "adapter_model-00001-of-00002.bin": "a shard"})
    stats = {name: (folder / name).stat() for name in THEIRS}
    inode = folder.stat().st_ino
    replace(folder)
    assert content(folder) == {**NEW, **THEIRS}  # no weights of an older save stay
    for name, before in stats.items():
        after = (folder / name).stat()
        assert (after.st_mtime_ns, after.st_ino, after.st_mode) == (before.st_mtime_ns, before.st_ino, before.st_mode)
    assert folder.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_of_an_adapter_alone_keeps_its_readme_and_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(adapter_folder, "swap_names", lambda *_: False)
    folder = tmp_path / "out"
    write(folder, {**OLD, "README.md": "my own words"})
    folder.chmod(0o750)
    before = (folder / "README.md").stat()
    replace(folder)
    assert content(folder) == {**NEW, "README.md": "my own words"}
    assert (folder / "README.md").stat().st_mtime_ns == before.st_mtime_ns
    assert folder.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_gets_the_model_card_too(tmp_path: Path) -> None:
    replace(tmp_path / "new" / "out")
    assert content(tmp_path / "new") == {f"out/{n}": text for n, text in {**NEW, "README.md": "a model card"}.items()}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {**NEW, "README.md": "a model card"}


def test_a_file_that_another_program_writes_during_the_save_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, swap = tmp_path / "out", adapter_folder.swap_names
    write(folder, OLD)
    with replacing_adapter(folder) as staged:
        write(staged, NEW)
        write(folder, {"early.txt": "theirs"})  # while the weights are written
    assert content(folder) == {**NEW, "early.txt": "theirs"}
    (folder / "early.txt").unlink()

    def late(first: Path, second: Path) -> bool:
        write(folder, {"late.txt": "theirs"})  # after the folder was looked at
        return swap(first, second)

    monkeypatch.setattr(adapter_folder, "swap_names", late)
    replace(folder)
    assert content(folder)["late.txt"] == "theirs"
    assert content(folder)[WEIGHTS] == "new weights"


@pytest.mark.parametrize("theirs", [THEIRS, {}])
def test_the_parent_folder_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: dict[str, str]
) -> None:
    folder = tmp_path / "out"
    write(folder, {**OLD, **theirs})
    inode = folder.stat().st_ino
    monkeypatch.setattr(adapter_folder.os, "access", lambda *_: False)
    with replacing_adapter(folder) as staged:
        assert staged.parent == folder
        write(staged, NEW)
    assert content(folder) == {**NEW, **theirs}
    assert folder.stat().st_ino == inode


@pytest.mark.parametrize("theirs", [THEIRS, {}])
def test_an_error_in_the_body_changes_nothing(tmp_path: Path, theirs: dict[str, str]) -> None:
    folder = tmp_path / "out"
    write(folder, {**OLD, **theirs})

    def fail() -> None:
        with replacing_adapter(folder) as staged:
            write(staged, {WEIGHTS: "half"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert content(folder) == {**OLD, **theirs}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def failing_replace(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.replace

    def replace_or_fail(source: Path, destination: Path) -> None:
        if Path(destination).name == name and Path(source).suffix == ".part":
            raise PermissionError(13, "Permission denied")
        real(source, destination)

    monkeypatch.setattr(adapter_folder.os, "replace", replace_or_fail)


def test_an_error_before_the_first_file_restores_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    write(folder, {**OLD, **THEIRS})
    failing_replace(monkeypatch, WEIGHTS)
    with pytest.raises(WriteError, match="Permission denied: the old content is unchanged"):
        replace(folder)
    assert content(folder) == {**OLD, **THEIRS}


def test_an_error_after_the_first_file_says_where_the_new_adapter_is_and_the_next_save_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    write(folder, {**OLD, **THEIRS})
    with monkeypatch.context() as patch:
        failing_replace(patch, CONFIG)
        with pytest.raises(WriteError, match=r"replaced in part.*complete in .*\.lorank_new_adapter"):
            replace(folder)
    assert not (folder / CONFIG).exists()  # so PEFT refuses the folder
    assert {name: (folder / NEW_ADAPTER / name).read_text() for name in NEW} == NEW
    replace(folder)
    assert content(folder) == {**NEW, **THEIRS}


def test_an_interrupted_save_is_read_by_lorank_refused_by_peft_and_completed_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = find_layers(adapted(tiny_llama()).eval())
    folder = tmp_path / "out"
    save_adapter(layers, folder)
    (folder / "notes.txt").write_text("mine")
    resize_(layers, {next(iter(layers)): LayerPlan((0,), 5)})
    with torch.no_grad():
        for layer in layers.values():
            layer.B.normal_()
        expected = layers.model(**token_batch()).logits
    with monkeypatch.context() as patch:
        failing_replace(patch, CONFIG)
        with pytest.raises(WriteError):
            save_adapter(layers, folder)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(tiny_llama(), folder)
    assert max(read_adapter_config(folder)["rank_pattern"].values()) == 6
    with torch.no_grad():
        assert torch.equal(load_adapter(tiny_llama(), folder)(**token_batch()).logits, expected)
    save_adapter(layers, folder)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), folder).eval()(**token_batch()).logits, expected)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md", "notes.txt"}


def test_a_trainers_output_folder_keeps_everything_but_its_adapter(tmp_path: Path) -> None:
    layers = find_layers(adapted(tiny_llama()))
    layers.model.save_pretrained(tmp_path)  # as trainer.save_model does
    write(tmp_path, {**THEIRS, "checkpoint-4/optimizer.pt": "moments", "training_args.bin": "theirs"})
    resize_(layers, {next(iter(layers)): LayerPlan((0,))})
    save_adapter(layers, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    for name, text in {**THEIRS, "checkpoint-4/optimizer.pt": "moments", "training_args.bin": "theirs"}.items():
        assert (tmp_path / name).read_text() == text


def test_a_folder_with_other_files_and_no_adapter_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"thesis.txt": "years of work"})
    with pytest.raises(AdapterError, match="is not an adapter's folder"):
        save_adapter(find_layers(adapted(tiny_llama())), tmp_path)
    assert content(tmp_path) == {"thesis.txt": "years of work"}


def test_own_files_are_those_of_peft_and_of_sharded_saves() -> None:
    own = (CONFIG, WEIGHTS, "adapter_model.bin", "adapter_model-00002-of-00003.safetensors")
    theirs = ("adapter_model.safetensors.bak", "my_adapter_model.bin", "adapter_config.json~", "adapter_notes.txt")
    assert all(map(is_adapter_file, (*own, "adapter_model.safetensors.index.json")))
    assert not any(map(is_adapter_file, theirs))
