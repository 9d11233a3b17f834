"""What the exact engine skips within a block, and what it must not skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorank.lora import find_layers
from lorank.scoring import ablation_scores
from tests.models import adapted, tiny_llama, token_batch


class Products(TorchFunctionMode):
    """Counts the products with given weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            self.count += id(args[1]) in self.weights
        return function(*args, **(kwargs or {}))


def products(rank: int) -> int:
    model = adapted(tiny_llama(1), r=rank)
    layers, batch = find_layers(model), token_batch()
    with Products([layer.module.get_base_layer().weight for layer in layers.values()]) as seen:
        result = ablation_scores(model, layers, batch, max_rows=len(batch["labels"]))
    assert result.engine == "exact"
    return seen.count


def test_a_variant_computes_only_what_its_layer_changes() -> None:
    """Of the block's seven frozen maps: four after q, k or v, three after o, one after gate or up, none after down."""
    assert products(rank=3) - products(rank=2) == 2 * (3 * 4 + 3 + 2 * 1 + 0)


def twice(mlp: Any, x: Tensor) -> Tensor:
    """Every layer is called again, with something else."""
    y = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y))


def written_to(mlp: Any, x: Tensor) -> Tensor:
    """The same tensor, but what is in it depends on the layer that was given it first."""
    x = x.clone()
    gate = mlp.act_fn(mlp.gate_proj(x))
    x.add_(gate.mean(-1, keepdim=True))
    return mlp.down_proj(gate * mlp.up_proj(x))


def written_into(mlp: Any, x: Tensor) -> Tensor:
    """What a layer gives is changed in place."""
    up = mlp.up_proj(x).mul_(0.5)
    return mlp.down_proj(mlp.gate_proj(x).tanh_().mul_(up))


def by_value(mlp: Any, x: Tensor) -> Tensor:
    """Which layers come first, and with what, depends on numbers."""
    if float(x.sum()) > 0:
        up = mlp.up_proj(x)
        gate = mlp.gate_proj(x)
    else:
        gate = mlp.gate_proj(x)
        up = mlp.up_proj(x if float(gate.sum()) > 0 else 2 * x)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def test_outputs_that_somebody_changes_in_place() -> None:
    """As some of PEFT's layers do with what their frozen map gives: a copy is kept of it as it was."""
    model = adapted(tiny_llama(2), r=2).double()
    layers, batch = find_layers(model), token_batch(4)
    for layer in layers.values():
        layer.module.get_base_layer().register_forward_hook(lambda _m, _a, output: output.mul_(1.5))
        layer.module.register_forward_hook(lambda _m, _a, output: output.mul_(0.9))
    reference = ablation_scores(model, layers, batch, engine="reference")
    exact = ablation_scores(model, layers, batch)
    assert exact.engine == "exact"
    for name in layers:
        torch.testing.assert_close(exact.scores[name], reference.scores[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("forward", "max_rows"),
    # What is stacked is one sum for by_value, so that it cannot be.
    [*((forward, rows) for forward in (twice, written_to, written_into) for rows in (None, 4)), (by_value, 4)],
)
def test_blocks_that_use_their_layers_otherwise(forward: Callable[[Any, Tensor], Tensor], max_rows: int | None) -> None:
    model = adapted(tiny_llama(2), r=2).double()
    for block in model.get_base_model().model.layers:
        block.mlp.forward = lambda x, mlp=block.mlp: forward(mlp, x)
    layers, batch = find_layers(model), token_batch(4)
    reference = ablation_scores(model, layers, batch, engine="reference")
    exact = ablation_scores(model, layers, batch, max_rows=max_rows)
    assert exact.engine == "exact"
    for name in layers:
        torch.testing.assert_close(exact.scores[name], reference.scores[name], rtol=0, atol=1e-5)
