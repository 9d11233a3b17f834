"""`lorank resize`: the files of adapters, without data and without their base models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from lorank.cli.app import app
from lorank.experiments.resize import resize
from lorank.lora import find_layers
from tests.models import adapted, tiny_llama


def lorank(*arguments: str | Path | float) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["resize", *[str(part) for part in arguments]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    model = adapted(tiny_llama(), r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"])
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"  # no base model is looked for
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "no/such/model"}))
    return folder


def updates(folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    return {
        name: layer.scaling * (layer.B.detach().double() @ layer.A.detach().double())
        for name, layer in find_layers(model).items()
    }


@pytest.mark.parametrize(
    "size", [("--rank", 2), ("--rank", 8), ("--budget", "40%"), ("--energy", 0.8), ("--max-lora-rank", 3)]
)
def test_every_size_and_its_figures(adapter: Path, tmp_path: Path, size: tuple[str, object]) -> None:
    """What is printed is what PEFT reads."""
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    result = lorank(adapter, "--out", tmp_path / "out", *size)
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    old, new = updates(adapter), updates(tmp_path / "out")
    numbers = [sum(value.numel() for value in load_file(f / "adapter_model.safetensors").values())
               for f in (adapter, tmp_path / "out")]  # fmt: skip
    assert f"{numbers[0]:,} → {numbers[1]:,}" in result.stdout
    lost = {name: float((update - new.get(name, 0 * update)).square().sum()) for name, update in old.items()}
    energy = 1 - sum(lost.values()) / sum(float(update.square().sum()) for update in old.values())
    change = max((lost[name] / float(update.square().sum())) ** 0.5 for name, update in old.items())
    assert f"{100 * energy:.2f} %" in result.stdout
    ranks = [len(value) for key, value in weights.items() if "lora_A" in key]
    if size == ("--rank", 8):
        assert set(ranks) == {8}
        assert change == 0
        assert "0 % of ‖BA‖" in result.stdout
    else:
        assert 0.2 < energy < 1
        assert f"{100 * change:.3g} % of ‖BA‖" in result.stdout
    if size[0] == "--budget":
        assert 0.35 * numbers[0] < numbers[1] <= 0.4 * numbers[0]
        assert len(set(ranks)) > 1
    elif size[0] == "--energy":
        assert all(1 - lost[name] / float(update.square().sum()) >= 0.8 - 1e-6 for name, update in old.items())
    elif size[1] != 8:
        assert set(ranks) == {size[1]}
    assert "lorank" not in (tmp_path / "out" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one size: --rank 8"),
        (["--rank", 2, "--energy", 0.5], "given: --rank and --energy"),
        (["--energy", 0], "--energy 0: expected a share above 0"),
        (["--budget", "1% of base"], "which lorank resize does not read"),
        (["--budget", "100%"], "less than 100 per cent"),
        (["--budget", "6"], "already fits the budget"),
        (["--rank", 64], "can hold at most min(d_in, d_out) = 32 ranks"),
    ],
)
def test_mistakes(adapter: Path, tmp_path: Path, options: list[object], message: str) -> None:
    result = lorank(adapter, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_folders(adapter: Path, tmp_path: Path) -> None:
    assert "is the adapter itself" in lorank(adapter, "--out", adapter, "--rank", 2).stderr
    assert "there is no such folder" in lorank(tmp_path / "no", "--out", tmp_path / "out", "--rank", 2).stderr
    assert lorank(adapter, "--out", tmp_path / "out", "--rank", 2).exit_code == 0
    assert "already exists" in lorank(adapter, "--out", tmp_path / "out", "--rank", 3).stderr
    assert lorank(adapter, "--out", tmp_path / "out", "--rank", 3, "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


def test_a_fault_of_the_writer_shows(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are of the files: one with halved updates keeps three quarters of the energy."""

    def save_wrongly(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file({key: value / 2 if "lora_B" in key else value for key, value in tensors.items()}, path, metadata)

    monkeypatch.setattr("lorank.lora.io.standalone.save_file", save_wrongly)
    resized = resize(adapter, tmp_path / "out", rank=6)
    assert resized.energy == pytest.approx(0.75)
    assert resized.change == pytest.approx(0.5)
