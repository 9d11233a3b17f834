"""Gramians and gradients of convolutions, against plain sums over positions."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from lorank.lora import AdapterLayers, find_layers
from lorank.scoring import measure_gramians, residual_gradients, weight_gradients
from lorank.scoring.ablation import ablation_scores
from lorank.scoring.saliency import saliency_scores
from lorank.scoring.taylor import first_order_scores
from tests.convolutions import KINDS, conv_net, picture_batch

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")


def model_and_layers(scale: float = 0.3) -> tuple[PeftModel, AdapterLayers]:
    torch.manual_seed(1)
    model = get_peft_model(conv_net(), LoraConfig(r=4, lora_alpha=8, target_modules=[*KINDS])).eval()
    layers = find_layers(model)
    for layer in layers.values():
        layer.B.data.normal_(std=scale)
    return model, layers


def patches_and_gradients(model: PeftModel, layers: AdapterLayers) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer, ∂L/∂D of a kernel D that is added to B A, (d_out, inputs, kernel…); and z with its gradient."""
    found, handles = {}, []
    for name, layer in layers.items():
        lora_A = layer.module.lora_A["default"]
        D = torch.zeros(layer.d_out, *lora_A.weight.shape[1:], requires_grad=True)

        def add(
            module: object, inputs: tuple[Tensor], output: Tensor, lora_A: object = lora_A, D: Tensor = D
        ) -> Tensor:
            return output + lora_A._conv_forward(inputs[0], D, None)  # type: ignore[attr-defined, no-any-return]

        handles.append(layer.module.register_forward_hook(add))
        found[name] = D
    model(**picture_batch()).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: D.grad.double() for name, D in found.items()}  # type: ignore[union-attr, misc]


def test_gradients_are_those_of_a_kernel_beside_the_update() -> None:
    model, layers = model_and_layers()
    expected = patches_and_gradients(model, layers)
    found = weight_gradients(model, layers, [picture_batch()], 4)
    left_out = residual_gradients(model, layers, [picture_batch()], {name: [2] for name in layers})
    for name, layer in layers.items():
        groups = layer.axes[0].copies
        of_groups = expected[name].flatten(1).chunk(groups)
        values = torch.stack([torch.linalg.svdvals(G)[:4] for G in of_groups]).square().sum(0).sqrt()
        torch.testing.assert_close(found[name].values, values, rtol=1e-4, atol=1e-7)
        assert found[name].right.shape == (layer.d_in, 4)
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(found[name].right.T @ found[name].right, eye, rtol=0, atol=1e-6)
        for G, u, v in zip(of_groups, found[name].left.chunk(groups), found[name].right.chunk(groups), strict=True):
            torch.testing.assert_close(
                (u.T @ G @ v * groups).diagonal(), torch.linalg.svdvals(G)[:4], rtol=1e-4, atol=1e-7
            )
        rest = left_out[name][0].right
        reached = layer.A_matrix.double().chunk(groups, 1)
        for rows, v in zip(reached, rest.chunk(groups), strict=True):
            torch.testing.assert_close(rows @ v, torch.zeros(layer.rank, 2).double(), rtol=0, atol=1e-5)


def test_patches_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = model_and_layers()
    whole = weight_gradients(model, layers, [picture_batch()], 2)
    monkeypatch.setattr("lorank.scoring.patches.LARGEST", 1)  # one sample at a time
    parts = weight_gradients(model, layers, [picture_batch()], 2)
    for name in layers:
        torch.testing.assert_close(parts[name].values, whole[name].values, rtol=1e-4, atol=1e-8)


def test_gramians_are_sums_over_positions_and_groups() -> None:
    model, layers = model_and_layers()
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in layers.items():

        def keep(module: object, inputs: object, z: Tensor, name: str = name) -> None:
            z.retain_grad()
            seen[name] = [z]

        handles.append(layer.module.lora_A["default"].register_forward_hook(keep))
    model(**picture_batch()).loss.backward()
    for handle in handles:
        handle.remove()
    found = measure_gramians(model, layers, [picture_batch()])
    for name, layer in layers.items():
        (z,) = seen[name]
        groups, rank = layer.axes[0].copies, layer.rank
        Z, D, count = torch.zeros(rank, rank).double(), torch.zeros(rank, rank).double(), 0
        largest = z.grad.abs().max()  # type: ignore[union-attr]
        for sample in range(len(z)):
            for group in range(groups):
                some = slice(group * rank, (group + 1) * rank)
                values, gradients = (part[sample, some].flatten(1).double() for part in (z.detach(), z.grad))  # type: ignore[index]
                counted = gradients.abs().amax(0) > 1e-6 * largest
                Z += values[:, counted] @ values[:, counted].T
                D += gradients @ gradients.T
                count += int(counted.sum())
        torch.testing.assert_close(found[name].Z, Z / count, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found[name].D, len(z) * D, rtol=1e-4, atol=1e-10)


def test_scores_agree_with_one_another() -> None:
    """First-order scores are the derivative of the loss with respect to gates, which ablation sets to zero."""
    model, layers = model_and_layers(0.003)
    batch = picture_batch()
    exact = ablation_scores(model, layers, batch, terms="without")
    first = first_order_scores(model, layers, batch, terms="without")
    saliency = saliency_scores(model, layers, [batch])
    one, other, third = (torch.cat([part[name] for name in layers]) for part in (exact.scores, first.scores, saliency))
    assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) > 0.999
    torch.testing.assert_close(third, other.abs(), rtol=1e-3, atol=1e-7)
