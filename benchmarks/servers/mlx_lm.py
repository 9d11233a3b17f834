"""MLX-LM's loader, `mlx_lm.load(…, adapter_path=…)`, on a CPU: python -m benchmarks.servers.mlx_lm

The update that each of its layers holds is compared with PEFT's. Logits are printed with those of the base model beside
them, because MLX and PyTorch differ by more than rounding there already.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.servers.example import BASE, need, peft_logits, report, save_example, tokens


def main() -> int:
    need("mlx", "mlx_lm")
    import mlx.core as mx
    import numpy as np
    import torch
    from mlx_lm import load

    from lorank import export_adapter
    from lorank.lora.export.adapter_file import read_adapter_file

    def numbers(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(array.astype(mx.float32)))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapter = save_example(folder / "adapter")
        export_adapter(adapter, folder / "mlx", "mlx")
        updates = read_adapter_file(adapter).updates
        ids = mx.array(tokens().numpy())
        base, model = load(BASE)[0], load(BASE, adapter_path=str(folder / "mlx"))[0]
        report("MLX-LM", "mlx-lm", "base model", numbers(base(ids)[0]), peft_logits(None))
        report("MLX-LM", "mlx-lm", "mlx", numbers(model(ids)[0]), peft_logits(adapter))
        found, wanted = [], []
        for name, module in model.named_modules():
            if hasattr(module, "lora_a"):
                update = module.scale * (numbers(module.lora_a).double() @ numbers(module.lora_b).double()).T
                found.append(update.flatten())
                left, right = (
                    updates[name].factors if name in updates else (0 * update, torch.eye(update.shape[1]).double())
                )
                wanted.append((left @ right).flatten())
        passed = report("MLX-LM", "mlx-lm", "mlx", torch.cat(found), torch.cat(wanted), "updates")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
