"""diffusers' loaders on a small UNet and a small text encoder: python -m benchmarks.servers.diffusers

`load_lora_adapter` reads the form `diffusers`. The form `comfyui` goes through the loader of a whole pipeline, which
converts kohya's keys (`lora_state_dict`). Outputs are compared with those of PEFT.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.servers.example import need, report

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"]


def main() -> int:
    need("diffusers")
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    from lorank import export_adapter

    def unet() -> Any:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()

    @torch.no_grad()
    def output(model: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        image, text = torch.randn(1, 4, 8, 8, generator=noise), torch.randn(1, 5, 16, generator=noise)
        return model(image, 3, encoder_hidden_states=text).sample.flatten()

    passed = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = {"rank_pattern": {"to_q": 3, "conv1": 2}, "alpha_pattern": {"to_v": 3, "conv1": 5}}
        adapted: Any = get_peft_model(unet(), LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, **settings))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder / "adapter")
        wanted = output(adapted.eval())
        change = float((wanted - output(unet())).abs().max() / wanted.abs().max())
        print(f"the adapter changes the output by {change:.2f} of the largest")
        for form in ("diffusers", "comfyui"):
            export_adapter(folder / "adapter", folder / form, form)
            model = unet()
            state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
                folder / form, unet_config=model.config, return_lora_metadata=True
            )
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(
                state, alphas, model, adapter_name="check", metadata=metadata
            )
            passed &= report("diffusers", "diffusers", form, output(model), wanted, "outputs")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
