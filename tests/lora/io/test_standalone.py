"""Adapters read without their base model: what PEFT would read, and what is carried over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorank.errors import AdapterError
from lorank.lora import LayerPlan, find_layers, open_standalone, resize_, save_standalone
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch

pytestmark = [  # PEFT, when it saves
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (tiny_llama, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}),
    "dora": (tiny_llama, {"use_dora": True, "use_rslora": True}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"]}),
    "biases": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    "lora_bias": (tiny_bert, {"target_modules": ["query"], "lora_bias": True}),
    "head": (
        tiny_bert,
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "expression": (tiny_llama, {"target_modules": r".*\.(q|v)_proj", "layers_to_transform": None}),
    "new_tokens": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}),
}


@pytest.fixture(params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, Any]:
    make, settings = CASES[request.param]
    model = adapted(make(), **settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model, make


def test_it_reads_what_peft_reads_and_writes_what_was_there(saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, _ = saved
    read = open_standalone(folder)
    layers = find_layers(model)
    assert set(read.layers) == set(layers)
    for name, layer in layers.items():
        assert torch.equal(read.layers[name].A, layer.A)
        assert torch.equal(read.layers[name].B, layer.B)
        assert read.layers[name].scaling == layer.scaling
        assert (read.layers[name].d_in, read.layers[name].d_out) == (layer.d_in, layer.d_out)
        assert read.layers[name].min_rank == layer.min_rank
    save_standalone(read, tmp_path / "copy")
    assert _read_settings(tmp_path / "copy") == _read_settings(folder)
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@torch.no_grad()
def test_other_ranks_load_as_those_of_the_live_model_do(saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Ranks go from one module, and all of them from another if that is allowed."""
    folder, model, make = saved
    read = open_standalone(folder)
    live = find_layers(model)
    first, *_, last = live
    plan = {first: LayerPlan((1, 0)), last: LayerPlan((0,) if live[last].min_rank or len(live) == 1 else ())}
    resize_(live, plan)
    resize_(read.layers, plan)
    save_standalone(read, tmp_path / "out")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    batch = token_batch()
    if make is tiny_bert:
        batch = {**batch, "labels": torch.arange(4) % 3}
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    again = open_standalone(tmp_path / "out")  # earlier statements of rank 0 are kept
    second = next(iter(again.layers))
    if len(again.layers) > 1 and not again.layers[second].min_rank:
        resize_(again.layers, {second: LayerPlan(())})
        save_standalone(again, tmp_path / "out")
        targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
        stated = targets.split("|") if isinstance(targets, str) else targets
        assert sum(entry.startswith("rank-0:") for entry in stated) == 2


def test_bfloat16_stays(tmp_path: Path) -> None:
    adapted(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    read = open_standalone(tmp_path)
    resize_(read.layers, dict.fromkeys(read.layers, LayerPlan((0, 2), 1)))
    save_standalone(read, tmp_path)
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}


def test_the_global_random_state_is_untouched(tmp_path: Path) -> None:
    adapted(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    open_standalone(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "adapter_config.json").read_text())
    targets = settings["target_modules"]  # PEFT writes a set in any order
    return {**settings, "target_modules": targets if isinstance(targets, str) else sorted(targets)}


def _without(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if part not in key}, path)


def _settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _without(folder, "layers.0.self_attn.q_proj.lora_B"), "no pair of lora_A and lora_B"),
        (lambda folder: _without(folder, "lora_"), "holds no LoRA weights"),
        (lambda folder: _settings(folder, r=7), "do not fit each other"),
        (lambda folder: _settings(folder, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda folder: _settings(folder, target_parameters=["experts.w"]), "has target_parameters, which cannot be"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    ],
)
def test_files_that_cannot_be_read(damage: Any, message: str, tmp_path: Path) -> None:
    adapted(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(AdapterError, match=message):
        open_standalone(tmp_path)
