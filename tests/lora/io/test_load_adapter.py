"""An adapter is loaded onto its own base model; another model, or a folder without an adapter, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorank.errors import AdapterError
from lorank.lora import LayerPlan, find_layers, load_adapter, read_adapter_config, resize_, save_adapter
from lorank.lora.io.adapter_validation import WEIGHTS
from tests.lora.forms import Q
from tests.models import adapted, tiny_llama, token_batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with one module of other rank, and one of rank 0."""
    layers = find_layers(adapted(tiny_llama(), target_modules=["q_proj", "v_proj"]))
    resize_(layers, {Q: LayerPlan((0, 2)), list(layers)[-1]: LayerPlan(())})
    return save_adapter(layers, tmp_path / "adapter")


def test_a_loaded_adapter_is_frozen_in_evaluation_mode_and_has_the_saved_outputs(folder: Path) -> None:
    saved = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"]).eval()
    layers = find_layers(saved)
    resize_(layers, {Q: LayerPlan((0, 2)), list(layers)[-1]: LayerPlan(())})
    loaded = load_adapter(tiny_llama(), folder)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert find_layers(loaded).ranks == {name: rank for name, rank in layers.ranks.items() if rank}
    with torch.no_grad():
        assert torch.equal(loaded(**token_batch()).logits, saved(**token_batch()).logits)


def test_the_settings_are_those_in_the_file(folder: Path) -> None:
    assert read_adapter_config(folder)["rank_pattern"][r"^model\.layers\.0\.self_attn\.q_proj"] == 2


@pytest.mark.parametrize("changes", [{"hidden_size": 16}, {"layers": 1}], ids=["other widths", "fewer blocks"])
def test_another_base_model_is_refused(changes: dict[str, int], folder: Path) -> None:
    with pytest.raises(AdapterError, match="does not fit this model"):
        load_adapter(tiny_llama(**changes), folder)


def test_a_weight_that_is_missing_in_the_file_is_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    gone = next(name for name in weights if "lora_B" in name)
    save_file({name: value for name, value in weights.items() if name != gone}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"does not fit this model.*layers\.0\.self_attn\.q_proj\.lora_B"):
        load_adapter(tiny_llama(), folder)


def test_folders_without_an_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such folder"):
        read_adapter_config(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        read_adapter_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="is a whole model"):
        read_adapter_config(tmp_path)
