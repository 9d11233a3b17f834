"""SGLang's loader of adapters (no engine, no GPU): python -m benchmarks.servers.sglang

The files of the loader are SGLang's own; the rest of SGLang is replaced by stand-ins (benchmarks/servers/part_of.py),
so the wheel alone is enough: pip install --no-deps sglang. `LoRAConfig` reads the settings; `LoRAAdapter` computes the
factor and stacks q, k, v and gate, up. The updates of the stacked projections are compared with PEFT's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from benchmarks.servers.example import BASE, need, report, save_example
from benchmarks.servers.part_of import use_part_of

STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def main() -> int:
    need("sglang")
    real = ("lora.lora", "lora.lora_config", "lora.utils", "layers.utils.common")
    use_part_of("sglang", [f"sglang.srt.{name}" for name in real])
    from sglang.srt.layers.utils.common import get_layer_id

    sys.modules["sglang.srt.layers.utils"].get_layer_id = get_layer_id  # type: ignore[attr-defined]  # re-exported there
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    from lorank import export_adapter
    from lorank.lora.export.adapter_file import read_adapter_file

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapter = save_example(folder / "adapter")
        updates = read_adapter_file(adapter).updates
        export_adapter(adapter, folder / "uniform", "uniform")
        loaded = LoRAAdapter(
            "check", LoRAConfig(str(folder / "uniform")), AutoConfig.from_pretrained(BASE), None, None, None
        )
        loaded.initialize_weights_from_tensors(load_file(folder / "uniform" / "adapter_model.safetensors"))
        found, wanted = [], []
        for layer in loaded.layers:
            for key, A in layer.weights.items():
                if not key.endswith("lora_A.weight"):
                    continue
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                parent, _, last = name.rpartition(".")
                B = layer.weights[key.replace("lora_A", "lora_B")]
                row = 0
                for number, part in enumerate(STACKS.get(last, (last,))):
                    rank = loaded.config.r
                    one = updates.get(f"{parent}.{part}")
                    height = len(one.B) if one is not None else len(B) - row  # only the last one of a stack is absent
                    update = (
                        loaded.scaling
                        * B[row : row + height].double()
                        @ A[number * rank : (number + 1) * rank].double()
                    )
                    row += height
                    found.append(update.flatten())
                    wanted.append(
                        (one.factors[0] @ one.factors[1]).flatten() if one else torch.zeros(update.numel()).double()
                    )
        passed = report("SGLang", "sglang", "uniform", torch.cat(found), torch.cat(wanted), "updates")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
