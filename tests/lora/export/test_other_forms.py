"""Forms for programs that are not PEFT: the files, read by these programs' own rules, written down here once more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from lorank.errors import AdapterError
from lorank.lora import find_layers
from lorank.lora.export import export_adapter
from tests.lora.export.adapters import KINDS, logits, save
from tests.models import token_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]


def updates(kind: str, adapter: Path) -> dict[str, Tensor]:
    """s B A of every module, as PEFT reads the adapter, float64."""
    layers = find_layers(PeftModel.from_pretrained(KINDS[kind][0](), adapter))
    return {
        name: layer.scaling * layer.B.detach().double() @ layer.A.detach().double() for name, layer in layers.items()
    }


@pytest.mark.parametrize("kind", ["lorank", "patterns"])
def test_gguf_holds_the_updates_in_the_order_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install lorank[gguf]")
    adapter, base = save(kind, tmp_path)
    export_adapter(adapter, tmp_path / "out", "gguf", base=base)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    tensors = {one.name: torch.from_numpy(one.data.copy()).double() for one in reader.tensors}
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    wanted = updates(kind, adapter)
    for name, update in wanted.items():
        _, _, layer, _, last = name.split(".")
        A, B = (tensors.pop(f"blk.{layer}.{names[last]}.weight.lora_{part}") for part in "ab")
        assert len(A) == B.shape[1]
        found = fields["adapter.lora.alpha"] / len(A) * B @ A
        if last in ("q_proj", "k_proj"):  # head by head, rows (i, i + half) of transformers are rows (2 i, 2 i + 1)
            heads = 4 if last == "q_proj" else 2
            size = len(update) // heads
            rows = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)]
            found = found[torch.argsort(torch.tensor(rows))]
        torch.testing.assert_close(found, update, rtol=0, atol=1e-6)
    assert not tensors


def test_gguf_of_an_embedding_and_of_an_unknown_base(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install lorank[gguf]")
    adapter, base = save("embedding", tmp_path)
    export_adapter(adapter, tmp_path / "out", "gguf", base=base, dtype="float16")
    tensors = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").tensors}
    A, B = (torch.from_numpy(tensors[f"token_embd.weight.lora_{part}"].copy()).double() for part in "ab")
    wanted = updates("embedding", adapter)["model.embed_tokens"]
    torch.testing.assert_close(B @ A.T / A.shape[1], wanted, rtol=0, atol=2e-3)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="needs the configuration of the base model"):
        export_adapter(adapter, tmp_path / "other", "gguf")
    with pytest.raises(AdapterError, match=r"is an embedding whose weight is \(or may be\) that of the output layer"):
        export_adapter(adapter, tmp_path / "other", "mlx")
    (tmp_path / "elsewhere").rename(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    with pytest.raises(AdapterError, match="has 64 embeddings with the adapter, and 60 in the base model"):
        export_adapter(adapter, tmp_path / "other", "gguf")


@pytest.mark.parametrize("kind", ["lorank", "rslora"])
def test_mlx_reads_its_two_files(kind: str, tmp_path: Path) -> None:
    adapter, base = save(kind, tmp_path)
    export_adapter(adapter, tmp_path / "out", "mlx", base=base)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["fine_tune_type"], settings["num_layers"]) == ("lora", 2)
    lora = settings["lora_parameters"]
    assert set(lora["keys"]) <= {
        *(f"self_attn.{one}_proj" for one in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("up", "gate", "down")),
    }
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    for name, update in updates(kind, adapter).items():
        A, B = tensors.pop(f"{name}.lora_a").double(), tensors.pop(f"{name}.lora_b").double()
        assert A.shape[1] == len(B) == lora["rank"]
        torch.testing.assert_close(lora["scale"] * (A @ B).T, update, rtol=0, atol=1e-6)
    assert not tensors


class TinyUnet(nn.Module):
    """Modules with the names of a UNet of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.Module()
        block.to_q, block.conv1 = nn.Linear(6, 6), nn.Conv2d(2, 3, 3)
        self.down_blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        block = self.down_blocks[0]
        return block.conv1(block.to_q(x)).flatten()


def test_image_models(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"conv1": 5}, "target_modules": ["to_q", "conv1"]}
    model = get_peft_model(TinyUnet(), LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "adapter")
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    wanted = model(x)
    assert not torch.allclose(wanted, TinyUnet()(x), atol=0.1)

    export_adapter(tmp_path / "adapter", tmp_path / "diffusers", "diffusers")
    with safe_open(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors", "pt") as file:
        packed = json.loads(file.metadata()["lora_adapter_metadata"])
        state = {key.removeprefix("unet."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    plain = TinyUnet()  # as diffusers does it
    inject_adapter_in_model(LoraConfig(**{key.removeprefix("unet."): value for key, value in packed.items()}), plain)
    set_peft_model_state_dict(plain, state)
    torch.testing.assert_close(plain(x), wanted)

    export_adapter(tmp_path / "adapter", tmp_path / "comfyui", "comfyui")
    state = load_file(tmp_path / "comfyui" / "pytorch_lora_weights.safetensors")
    plain = TinyUnet()  # as ComfyUI does it: weight += alpha / rank · up · down
    for name in ("to_q", "conv1"):
        key = f"lora_unet_down_blocks_0_{name}"
        down, up, alpha = (state.pop(f"{key}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = getattr(plain.down_blocks[0], name).weight
        weight.data += alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    assert not state
    torch.testing.assert_close(plain(x), wanted)
    with pytest.raises(AdapterError, match="is a convolution"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "uniform")


def test_experts_without_a_module_can_be_merged(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}

    def base() -> MixtralForCausalLM:
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=3, num_key_value_heads=2, **sizes))

    base().save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    model = get_peft_model(base(), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="Merge it: --form merged"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "tight")
    assert export_adapter(tmp_path / "adapter", tmp_path / "out", "merged").difference < 1e-5
    merged = MixtralForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = token_batch()
    torch.testing.assert_close(merged(**batch).logits, model.eval()(**batch).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["lorank", "dora", "head"])
def test_merged_models_need_no_peft(kind: str, tmp_path: Path) -> None:
    adapter, base = save(kind, tmp_path, weights=True)
    done = export_adapter(adapter, tmp_path / "out", "merged")
    assert done.difference < 1e-5
    make = AutoModelForSequenceClassification if kind == "head" else AutoModelForCausalLM
    model = make.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(kind, None, model), logits(kind, adapter), rtol=1e-4, atol=1e-5)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(AdapterError, match="is quantised"):
        export_adapter(adapter, tmp_path / "again", "merged")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="needs the base model"):
        export_adapter(adapter, tmp_path / "again", "merged")
    assert not (tmp_path / "again").exists()
