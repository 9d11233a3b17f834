"""The forms that PEFT reads: the same logits in plain PEFT, and the settings that programs expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorank
from lorank.errors import AdapterError
from lorank.lora.export import export_adapter
from tests.lora.export.adapters import KINDS, PLAIN, logits, save
from tests.models import adapted, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def ranks(folder: Path) -> set[int]:
    weights = load_file(folder / "adapter_model.safetensors")
    return {len(value) for key, value in weights.items() if "lora_A" in key or "embedding_A" in key}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["peft", "tight"])
def test_everything_stays(kind: str, form: str, tmp_path: Path) -> None:
    adapter, _ = save(kind, tmp_path)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    done = export_adapter(adapter, tmp_path / "out", form)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    wanted, found = logits(kind, adapter), logits(kind, tmp_path / "out")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert done.difference < 1e-6
    if form == "tight":
        written = settings(tmp_path / "out")
        assert (written["lora_alpha"], written["alpha_pattern"], written["use_rslora"]) == (1, {}, False)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| Base model | base (a local folder) |" in card
        assert ("`rank_pattern`" in card) == bool(written["rank_pattern"])


@pytest.mark.parametrize("kind", PLAIN)
def test_uniform(kind: str, tmp_path: Path) -> None:
    adapter, base = save(kind, tmp_path)
    done = export_adapter(adapter, tmp_path / "out", "uniform", base=base)
    torch.testing.assert_close(logits(kind, tmp_path / "out"), logits(kind, adapter), rtol=1e-5, atol=1e-5)
    written = settings(tmp_path / "out")
    assert ranks(tmp_path / "out") == {written["r"]} == {written["lora_alpha"]}
    assert written["r"] in (8, 16)
    assert (written["rank_pattern"], written["alpha_pattern"], written["use_rslora"]) == ({}, {}, False)
    if kind == "lorank":
        assert sum(not old for old, _ in done.ranks.values()) == 1  # the module at rank 0
        assert set(written["target_modules"]) == set(KINDS[kind][1]["target_modules"])
    if kind == "rslora":  # SGLang computes q, k and v as one
        assert sum(not old for old, _ in done.ranks.values()) == 2


def test_uniform_without_the_base_model_says_so(tmp_path: Path) -> None:
    adapter, base = save("lorank", tmp_path)
    base.rename(tmp_path / "elsewhere")
    done = export_adapter(adapter, tmp_path / "out", "uniform", rank=64)
    assert ranks(tmp_path / "out") == {64}
    assert sum(not old for old, _ in done.ranks.values()) == 1
    assert "give --base" in done.notes[0]
    torch.testing.assert_close(logits("lorank", tmp_path / "out"), logits("lorank", adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "rank", "dtype", "written"),
    [(8, 4, None, "bfloat16"), (9, 3, None, "float32"), (9, 3, "bfloat16", "bfloat16"), (9, 3, "float16", "float16")],
)
def test_half_precision_is_not_rounded_again_unless_asked(
    alpha: int, rank: int, dtype: str | None, written: str, tmp_path: Path
) -> None:
    adapted(tiny_llama(), r=rank, lora_alpha=alpha, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    done = export_adapter(tmp_path / "adapter", tmp_path / "out", "tight", dtype=dtype)
    assert done.dtype == written
    assert bool(done.notes) == (written == "float32")
    assert done.difference < (1e-6 if dtype is None else 5e-3)
    assert (done.difference < 1e-12) == (dtype is None)


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        ("dora", "uniform", "also has DoRA. Use --form merged"),
        ("dora", "gguf", "also has DoRA. Use --form merged"),
        ("head", "uniform", r"also has whole modules \(classifier"),
        ("biases", "mlx", r"biases of the base model \(bias='all'\)"),
        ("lora_bias", "mlx", r"biases of B \(lora_bias\)"),
        ("new_tokens", "gguf", r"trained tokens \(trainable_token_indices\)"),
        ("embedding", "diffusers", "are those of no image model"),
        ("conv1d", "gguf", "the base model is 'gpt2'. Use --form tight"),
        ("lorank", "tigth", "expected one of peft, tight, uniform"),
    ],
)
def test_what_a_form_cannot_hold(kind: str, form: str, message: str, tmp_path: Path) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    adapter, _ = save(kind, tmp_path)
    with pytest.raises(AdapterError, match=message):
        export_adapter(adapter, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_too_low_or_too_high(tmp_path: Path) -> None:
    adapter, _ = save("lorank", tmp_path)
    with pytest.raises(AdapterError, match="rank 8 is below the largest rank of a module, 11"):
        export_adapter(adapter, tmp_path / "out", "uniform", rank=8)
    with pytest.raises(AdapterError, match="rank=8 is for the forms 'uniform' and 'mlx'"):
        export_adapter(adapter, tmp_path / "out", "tight", rank=8)
    model = adapted(tiny_llama(), r=600, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="a module has rank 600, and programs that want one rank serve at most 512"):
        lorank.export_adapter(model, tmp_path / "out", "uniform")
    assert not (tmp_path / "out").exists()


def test_a_live_model(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    assert lorank.export_adapter(model, tmp_path / "out").form == "tight"
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits("lorank", tmp_path / "out"), logits("lorank", tmp_path / "adapter"))


def test_folders(tmp_path: Path) -> None:
    adapter, _ = save("rslora", tmp_path)
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="is the adapter itself"):
        export_adapter(adapter, adapter, "tight", overwrite=True)
    export_adapter(adapter, out, "mlx")
    with pytest.raises(AdapterError, match="already exists"):
        export_adapter(adapter, out, "mlx")
    with pytest.raises(AdapterError, match="holds an export in another form"):
        export_adapter(adapter, out, "tight", overwrite=True)
    export_adapter(adapter, out, "mlx", rank=9, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 9
    (out / "mine.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"also holds mine\.txt"):
        export_adapter(adapter, out, "mlx", overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("form", ["tight", "mlx"])
def test_a_fault_of_the_writer_leaves_nothing(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_wrongly(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(
            {key: value * 1.001 if "lora_b" in key.lower() else value for key, value in tensors.items()}, path, metadata
        )

    adapter, _ = save("rslora", tmp_path)
    module = "mlx" if form == "mlx" else "export"
    monkeypatch.setattr(f"lorank.lora.export.{module}.save_file", save_wrongly)
    with pytest.raises(AdapterError, match=r"differs from the original by 1\.0e-03"):
        export_adapter(adapter, tmp_path / "out", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "changed the base weights"),
        ({"target_parameters": ["experts.w"]}, "Merge it: --form merged"),
        ({"r": 7, "rank_pattern": {}}, "do not fit each other"),
    ],
)
def test_adapters_that_are_no_update_of_their_base(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapter, _ = save("rslora", tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(AdapterError, match=message):
        export_adapter(adapter, tmp_path / "out", "tight")
