"""vLLM's loader of adapters (no engine, no GPU), and its factors and weights: python -m benchmarks.servers.vllm

The files of the loader are vLLM's own; the rest of vLLM is replaced by stand-ins (benchmarks/servers/part_of.py), so
the wheel alone is enough: pip install --no-deps vllm. `PEFTHelper` reads the settings, `LoRAModel` the weights, and
`optimize` multiplies B by the factor. The update that this gives is compared with PEFT's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.servers.example import PROJECTIONS, need, report, save_example
from benchmarks.servers.part_of import use_part_of


def main() -> int:
    need("vllm")
    names = ("peft_helper", "lora_model", "lora_weights", "utils")
    use_part_of("vllm", [f"vllm.lora.{name}" for name in names], PIN_MEMORY=False)
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    from lorank import export_adapter
    from lorank.lora.export.adapter_file import read_adapter_file

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapter = save_example(folder / "adapter")
        wanted = {name: left @ right for name, one in read_adapter_file(adapter).updates.items()
                  for left, right in [one.factors]}  # fmt: skip
        passed = True
        for form in ("peft", "tight", "uniform"):
            export_adapter(adapter, folder / form, form)
            helper = PEFTHelper.from_local_dir(str(folder / form), max_position_embeddings=256)
            loaded = LoRAModel.from_local_checkpoint(
                str(folder / form), set(PROJECTIONS), helper, lora_model_id=1, device="cpu", dtype=torch.float32
            )
            found = []
            for name in wanted:
                one = loaded.loras[name]
                one.optimize()
                found.append((one.lora_b.double() @ one.lora_a.double()).flatten())
            whole = torch.cat([update.flatten() for update in wanted.values()])
            passed &= report("vLLM", "vllm", form, torch.cat(found), whole, "updates")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
