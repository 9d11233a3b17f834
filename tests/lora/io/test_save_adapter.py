"""What is saved is a plain PEFT adapter: it loads in a process that never imports lorank, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lorank.errors import AdapterError
from lorank.lora import LayerPlan, find_layers, fold_gates_, resize_, save_adapter
from lorank.testing import plain_peft
from tests.lora.forms import gated
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch

CASES = {
    "llama": (tiny_llama, {}),
    "llama_rslora_embedding": (
        tiny_llama,
        {"use_rslora": True, "target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    ),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "bert": (tiny_bert, {"task_type": "SEQ_CLS"}),
}


def test_different_ranks_gates_and_rank_0_reload_exactly_without_lorank(tmp_path: Path) -> None:
    for kind, (make, lora) in CASES.items():
        batch, logits = save_case(tmp_path / kind, make, lora)
        auto = "AutoModelForSequenceClassification" if kind == "bert" else "AutoModelForCausalLM"
        out = plain_peft().logits(tmp_path / kind / "base", tmp_path / kind / "adapter", batch, auto)
        scale = logits.abs().max()
        assert (out["logits"] - logits).abs().max() <= 1e-6 * scale, kind
        assert (out["merged"] - logits).abs().max() <= 1e-6 * scale, kind


def save_case(folder: Path, make, lora) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Saves an adapter with ranks 0 to 5 and gates on every other layer, and its base model; a batch and its logits."""
    base = make()
    base.save_pretrained(folder / "base")
    model = adapted(base, lora_alpha=7, **lora).eval()  # s = 7/4: no alpha stays whole
    layers = find_layers(model)
    names = list(layers)
    plan = {name: LayerPlan(tuple(range(1 + i % 4)), i % 3) for i, name in enumerate(names)}
    plan[names[1]] = LayerPlan(())
    resize_(layers, plan)
    for i, layer in enumerate(layers.values()):
        with torch.no_grad():
            layer.B.add_(0.01)
        if i % 2:
            layer.gate = torch.linspace(0.2, 1.5, layer.rank)
    batch = {key: value for key, value in token_batch(padded=True).items() if key != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
    save_adapter(layers, folder / "adapter")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)  # saving left the live model alone, gates included
    assert layers[names[3]].gate is not None
    return batch, expected


def test_the_config_names_every_module_in_full_and_leaves_out_rank_0(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    original = model.peft_config["default"].target_modules
    q, k = (f"model.layers.0.self_attn.{part}_proj" for part in "qk")
    resize_(layers, {q: LayerPlan(()), k: LayerPlan((0, 1, 2, 3), 3)})
    model.save_pretrained(tmp_path)  # plain PEFT's own call
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 13
    assert config["rank_pattern"][r"^model\.layers\.0\.self_attn\.k_proj"] == 7
    assert config["alpha_pattern"][r"^model\.layers\.0\.self_attn\.k_proj"] == 14
    # The largest rank and s·r as the global values: right too where patterns are not read.
    assert (config["r"], config["lora_alpha"]) == (7, 14)
    assert q not in config["target_modules"]
    assert len(config["target_modules"]) == 13 + 1
    assert f"rank-0:{q}" in config["target_modules"]  # no module has this name: PEFT ignores the entry
    from safetensors.torch import load_file

    assert not any(q in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    resize_(layers, {q: LayerPlan((), 1)})
    assert model.peft_config["default"].target_modules == original


def test_a_full_name_that_is_the_tail_of_another_is_told_apart(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.tower = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tower["proj"](self.proj(x))

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["proj"]))
    layers = find_layers(model)
    assert list(layers) == ["proj", "tower.proj"]
    resize_(layers, {"tower.proj": LayerPlan(())})
    model.save_pretrained(tmp_path)
    assert list(find_layers(PeftModel.from_pretrained(Net(), tmp_path))) == ["proj"]


def test_full_names_need_no_choice_of_layers(tmp_path: Path) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)})])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()
            self.tower = nn.ModuleDict({"part": Part()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tower["part"].layers[0]["proj"](self.part.layers[0]["proj"](x))

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["proj"], layers_to_transform=[0]))
    layers = find_layers(model)
    resize_(layers, {"tower.part.layers.0.proj": LayerPlan(())})
    model.save_pretrained(tmp_path)
    assert list(find_layers(PeftModel.from_pretrained(Net(), tmp_path))) == ["part.layers.0.proj"]
    resize_(layers, {"tower.part.layers.0.proj": LayerPlan((), 1)})
    assert layers.config.target_modules == {"proj"}
    assert layers.config.layers_to_transform == [0]


def test_a_module_that_another_view_emptied_is_saved_once_it_has_ranks(tmp_path: Path) -> None:
    model = adapted(tiny_llama()).eval()
    name = next(iter(find_layers(model)))
    resize_(find_layers(model), {name: LayerPlan(())})
    layers = find_layers(model)
    resize_(layers, {name: LayerPlan((), 2)})
    with torch.no_grad():
        layers[name].B.normal_()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**token_batch()).logits
        found = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()(**token_batch()).logits
    assert torch.equal(found, expected)


def test_merge_and_unload_after_a_resize() -> None:
    model = adapted(tiny_llama()).eval()
    layers = find_layers(model)
    names = list(layers)
    resize_(layers, {names[0]: LayerPlan(()), names[1]: LayerPlan((2,), 2)})
    batch = token_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        actual = model.merge_and_unload()(**batch).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    layers = find_layers(adapted(tiny_llama()))
    save_adapter(layers, tmp_path / "out")
    resize_(layers, {next(iter(layers)): LayerPlan((0,))})
    save_adapter(layers, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no temporary folder stays
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="is not an adapter's folder"):
        save_adapter(layers, precious)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_an_error_while_saving_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    save_adapter(layers, tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    layers["model.layers.0.self_attn.q_proj"].gate = torch.zeros(4)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(layers, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert layers["model.layers.0.self_attn.q_proj"].gate is not None
    assert layers["model.layers.0.self_attn.q_proj"].B.any()


def test_an_adapter_of_another_name_lies_in_the_folder_itself_and_can_be_replaced(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
    layers = find_layers(model, "mine")
    for _ in range(2):
        save_adapter(layers, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    assert not (tmp_path / "out" / "other").exists()


def test_what_is_saved_has_the_gates_folded_and_the_live_model_keeps_them(tmp_path: Path) -> None:
    model, layers, gates = gated()
    model.eval()
    with torch.no_grad():
        logits = model(**token_batch()).logits
    B = {name: layer.B.detach().clone() for name, layer in layers.items()}
    model.save_pretrained(tmp_path / "theirs")  # nobody has to call ours
    save_adapter(layers, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        plain = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / folder).double().eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(**token_batch()).logits, logits, rtol=1e-6, atol=1e-6)
    assert layers.gates is gates
    assert all(torch.equal(layer.B, B[name]) for name, layer in layers.items())
    fold_gates_(layers)
    assert layers.gates is None
    with torch.no_grad():
        torch.testing.assert_close(model(**token_batch()).logits, logits, rtol=1e-10, atol=1e-12)
