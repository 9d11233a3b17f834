"""`lorank export` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorank.cli.app import app
from tests.lora.export.adapters import save

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


def lorank(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["export", *map(str, arguments)])


def places(adapter: Path, *options: object) -> dict[str, dict[str, Any]]:
    result = lorank(adapter, "--check", "--json", *options)
    assert result.exit_code == 0, result.output
    return {place["program"]: place for place in json.loads(result.stdout)["places"]}


def test_where_an_adapter_of_lorank_loads(tmp_path: Path) -> None:
    adapter, _ = save("lorank", tmp_path)
    found = places(adapter)
    assert {name: place["form"] for name, place in found.items() if not place["as_it_is"]} == {
        "SGLang": "uniform",
        "TGI": "uniform",
        "LoRAX": "uniform",
        "llama.cpp": "gguf",
        "Ollama": "gguf",
        "TensorRT-LLM": "tight",
        "MLX-LM": "mlx",
        "diffusers": None,
        "ComfyUI": None,
    }
    # the factor is 2 everywhere, so that one alpha / r is right, and alpha / own rank is not
    assert found["vLLM, old"]["as_it_is"]
    assert "wrong without a message" in found["TensorRT-LLM"]["why_not"]
    assert found["SGLang"]["padding"] > 3
    lorank(adapter, "--form", "uniform", "--out", tmp_path / "uniform")
    weights = (tmp_path / "uniform" / "adapter_model.safetensors").stat().st_size
    assert 0 < weights - found["SGLang"]["bytes"] < 10_000  # the names
    assert all(place["as_it_is"] for name, place in places(tmp_path / "uniform").items() if name in ("SGLang", "TGI"))
    lorank(adapter, "--form", "tight", "--out", tmp_path / "tight")
    assert places(tmp_path / "tight")["TensorRT-LLM"]["as_it_is"]
    shown = lorank(adapter, "--check").stdout
    assert "it wants one rank for all modules, and the adapter has 1 to 11" in shown


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("patterns", {"vLLM, new": None, "vLLM, old": "uniform", "llama.cpp": "gguf"}),
        ("dora", {"PEFT": None, "vLLM, new": "merged", "SGLang": "merged", "llama.cpp": "merged"}),
        ("head", {"PEFT": None, "vLLM, new": None, "SGLang": "merged", "TensorRT-LLM": "merged"}),
    ],
)
def test_where_other_adapters_load(kind: str, wanted: dict[str, str | None], tmp_path: Path) -> None:
    found = places(save(kind, tmp_path)[0])
    assert {name: found[name]["form"] for name in wanted} == wanted
    assert all(found[name]["as_it_is"] == (form is None) for name, form in wanted.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a form: --form peft, tight, uniform"),
        (["--form", "tight"], "give a folder for the result: --out"),
        (["--form", "tigth", "--out", "x"], "expected one of peft, tight"),
        (["--check", "--out", "x"], "--check writes nothing: leave --out out"),
        (["--form", "tight", "--out", "x", "--dtype", "int8"], "expected one of float32, float16, bfloat16"),
        (["--form", "merged", "--out", "x", "--component", "unet"], "is for the forms 'diffusers' and 'comfyui'"),
        (["--form", "comfyui", "--out", "x"], "are those of no image model"),
        (["--form", "gguf", "--out", "x", "--base", "./nowhere"], "has no configuration that can be read"),
    ],
)
def test_mistakes(options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = save("rslora", tmp_path)
    monkeypatch.chdir(tmp_path)
    result = lorank(adapter, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "x").exists()


def test_what_was_written_is_shown(tmp_path: Path) -> None:
    adapter, base = save("lorank", tmp_path)
    base.rename(tmp_path / "elsewhere")
    result = lorank(adapter, "--form", "uniform", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "(1 modules of zeros)" in result.stdout
    assert "largest difference of a module's update" in result.stdout
    assert "Note: the base model's configuration was not found" in result.stderr
