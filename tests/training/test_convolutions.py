"""Runs on real architectures with convolutions: a ResNet, a ConvNeXt with depthwise convolutions, a diffusion UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import lorank
from lorank.testing import AllocatorConformance, Loop, TinyModel
from tests.methods import METHODS, STEPS
from tests.models import digit_batch

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")


def resnet() -> PreTrainedModel:
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # a file of an adapter does not hold running statistics
    return model


def convnext() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ConvNextConfig(
        num_channels=1,
        patch_size=2,
        num_stages=2,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        num_labels=10,
        layer_scale_init_value=1.0,
    )
    return ConvNextForImageClassification(config)


MODELS: Mapping[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "resnet": (resnet, {"target_modules": ["convolution"]}),
    "convnext": (
        convnext,
        {"r": 8, "target_modules": ["dwconv", "pwconv1", "patch_embeddings", "downsampling_layer.1"]},
    ),
}


def a_contract(method: str, model: str) -> tuple[AllocatorConformance, TinyModel]:
    """The tests that every method passes (lorank.testing), and the model for them."""
    make, lora = MODELS[model]

    class Contract(AllocatorConformance):
        steps = STEPS

        def make(self, budget: Any = None) -> lorank.Allocator:
            if method == "balanced":
                return lorank.BalancedLoRA(budget=budget, wide=2, until=0.6)
            return METHODS[method].make(budget)

    Contract.lora = {**METHODS[method].lora, **lora}
    return Contract(), TinyModel(make, lambda i: digit_batch(first=4 * i), "AutoModelForImageClassification")


def test_a_resnet_in_a_process_with_plain_peft(tmp_path: Path) -> None:
    contract, kind = a_contract("balanced", "resnet")
    contract.test_an_adapter_saved_at_any_step_loads_in_plain_peft(kind, tmp_path)


@pytest.mark.parametrize(("method", "model"), [("balanced", "resnet"), ("alora-first-order", "convnext")])
def test_a_resumed_run_equals_the_uninterrupted_run(method: str, model: str, tmp_path: Path) -> None:
    contract, kind = a_contract(method, model)
    contract.test_a_resumed_run_equals_the_uninterrupted_run(kind, tmp_path)


def test_depthwise_convolutions_reload(tmp_path: Path) -> None:
    """PEFT merges no convolution with groups, so this has no counterpart in a process of its own."""
    contract, kind = a_contract("alora-first-order", "convnext")
    loop = Loop(kind, contract.make(), steps=STEPS, **contract.lora).run()
    layers = loop.ranks.layers
    assert {x.axes[0].copies for x in layers.values()} == {1, 4, 8}
    assert len({rank for record in loop.ranks.history for name, rank in record.ranks.items() if "dwconv" in name}) > 1
    loop.model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(convnext(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**kind.batch(50)).logits, loop.logits(), rtol=1e-6, atol=1e-6)


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def noise_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.mse_loss(predicted(model, batch), batch["noise"])


def predicted(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(batch["noisy"], batch["time"], batch["text"]).sample
    return found


def noise_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures, noise = torch.randn(2, 2, 2, 8, 8, generator=generator)
    time = torch.randint(0, 1000, (2,), generator=generator)
    return {"noisy": pictures + noise, "noise": noise, "time": time, "text": torch.randn(2, 3, 8, generator=generator)}


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_a_diffusion_unet(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the UNet is one of diffusers'")
    targets = ["to_q", "to_v", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv"]
    model = get_peft_model(unet(), LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    method = lorank.BalancedLoRA(budget="50% of adapter", wide=2, until=0.6)
    ranks = lorank.attach(
        model, optimizer, method, loss_fn=noise_loss, train_batches=[noise_batch(98), noise_batch(99)], total_steps=6
    )
    for step in range(6):
        noise_loss(model, noise_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks.layers.ranks
    assert len(set(found.values())) > 2
    assert len({rank for name, rank in found.items() if ".conv" in name}) > 1
    assert ranks.layers.parameters <= 0.5 * sum(3 * x.rank_parameters for x in ranks.layers.values())
    lorank.save_adapter(ranks.layers, tmp_path)
    with torch.no_grad():
        expected = predicted(model.eval(), noise_batch(97))
        plain = PeftModel.from_pretrained(unet(), tmp_path).eval()
        torch.testing.assert_close(predicted(plain, noise_batch(97)), expected, rtol=1e-5, atol=1e-6)
        merged = plain.merge_and_unload()
        torch.testing.assert_close(predicted(merged, noise_batch(97)), expected, rtol=1e-4, atol=1e-5)
