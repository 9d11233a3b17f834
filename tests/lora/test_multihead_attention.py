"""Why nn.MultiheadAttention is refused: what PEFT makes of it. If this changes, so may the refusal."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lorank.errors import AdapterError
from lorank.lora import find_layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.mlp(self.attn(x, x, x)[0])
        return found


def make(**lora: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Attention().double(), LoraConfig(r=4, target_modules=["attn"], **lora))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def test_it_is_refused_with_the_reason_and_a_way_round() -> None:
    message = r"attn is an nn.MultiheadAttention\. PEFT gives its two projections one rank.*target_modules=\['mlp'\]"
    with pytest.raises(AdapterError, match=message):
        find_layers(make())


def test_peft_gives_both_projections_one_rank() -> None:
    patterns = {"attn": 3, "out_proj": 5, "attn.base_layer.out_proj": 5}
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        model = make(rank_pattern=patterns)
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {3}


def test_peft_adds_the_update_of_the_output_projection_twice_and_its_gradient_once() -> None:
    model = make()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    module = model.base_model.model.attn
    out_proj = module.get_base_layer().out_proj
    updates = [layer.get_delta_weight("default").detach() for layer in (module, out_proj)]
    twice = Attention().double()
    twice.load_state_dict(
        {
            "attn.in_proj_weight": module.get_base_layer().in_proj_weight + updates[0],
            "attn.in_proj_bias": module.get_base_layer().in_proj_bias,
            "attn.out_proj.weight": out_proj.base_layer.weight + 2 * updates[1],
            "attn.out_proj.bias": out_proj.base_layer.bias,
            **{f"mlp.{key}": value for key, value in model.base_model.model.mlp.state_dict().items()},
        }
    )
    torch.testing.assert_close(model(x), twice(x))
    B = out_proj.lora_B["default"].weight
    (gradient,) = torch.autograd.grad(model(x).square().sum(), B)
    direction, step = torch.randn_like(B), 1e-5
    with torch.no_grad():
        B += step * direction
        above = model(x).square().sum()
        B -= 2 * step * direction
        below = model(x).square().sum()
    assert float((above - below) / (2 * step) / (gradient * direction).sum()) == pytest.approx(2, rel=1e-4)
