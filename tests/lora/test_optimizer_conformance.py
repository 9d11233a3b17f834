"""Every optimiser of PyTorch, and of the Trainer as far as they install: a resize is right, or refused before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank.errors import OptimizerStateError
from lorank.lora import AdapterLayer, LayerPlan, check_optimizer, find_layers, resize_, try_optimizer
from tests.models import adapted, tiny_llama
from tests.optimizers import ALL, COUPLED, OF_THE_TRAINER, QUANTISED, REFUSED

STEPS = 5  # before and after the resize
KEEP, ADD = (3, 1), 2
AXES = {"A": 0, "B": 1}


def layer_for(name: str) -> tuple[Any, AdapterLayer]:
    """All layers and the only one of them, with A (4, 32) and B (32, 4) in float64; for
    the Trainer's optimisers in float32, and where moments are quantised 32 times wider."""
    wide = name in QUANTISED
    model = tiny_llama(1, **({"hidden_size": 1024, "intermediate_size": 8} if wide else {}))
    model = adapted(model, target_modules=["q_proj"])
    layers = find_layers(model if "optim=" in name else model.double())
    (layer,) = layers.values()
    return layers, layer


def gradients(parts: dict[str, nn.Parameter]) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        part: [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for _ in range(STEPS)]
        for part, weight in parts.items()
    }


def take_steps(
    optimizer: torch.optim.Optimizer, parts: dict[str, nn.Parameter], steps: list[dict[str, Tensor]]
) -> None:
    for step in steps:
        for part, gradient in step.items():
            parts[part].grad = gradient.clone()
        optimizer.step()


def dense(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state's tensors of the parameter's shape, dequantised."""
    found: dict[str, Tensor] = {}
    state = optimizer.state[parameter]
    for key, value in state.items():
        if key in ("state1", "state2") and value.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise

            absmax, code = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
            parts = value.reshape(-1, parameter.numel()), absmax.reshape(-1, -(-parameter.numel() // 256))
            for i, (own, scale) in enumerate(zip(*parts, strict=True)):
                values = dequantize_blockwise(own.contiguous(), absmax=scale.contiguous(), code=code, blocksize=256)
                found[f"{key}.{i}"] = values.reshape(parameter.shape)
        elif isinstance(value, Tensor) and value.shape == (2, *parameter.shape):
            found |= {f"{key}.{i}": own for i, own in enumerate(value)}
        elif isinstance(value, Tensor) and value.shape == parameter.shape:
            found[key] = value if type(value) is Tensor else value.dequantize(torch.float32)  # type: ignore[attr-defined]
    return {key: value.clone() for key, value in found.items()}


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles for each new shape


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED])
def test_new_ranks_train_as_if_they_had_been_there_without_a_gradient(name: str) -> None:
    """A run with a resize, against a slow twin in which all ranks exist from the start.

    In the twin a rank has a zero gradient before it begins and after it has left. So its state is that of a new weight.
    """
    layers, layer = layer_for(name)
    optimizer = ALL[name]([layer.A, layer.B])
    parts = {"A": layer.A, "B": layer.B}
    old = layer.rank
    in_twin = torch.tensor([*KEEP, *range(old, old + ADD)])  # the places of the present ranks in the twin
    starts = {part: weight.detach().clone() for part, weight in parts.items()}
    first = [{part: draw[i] for part, draw in gradients(parts).items()} for i in range(STEPS)]
    take_steps(optimizer, parts, first)
    try_optimizer(optimizer, layers)
    before = {part: dense(optimizer, weight) for part, weight in parts.items()}
    resize_(layers, {layer.name: LayerPlan(KEEP, ADD)}, optimizer)
    new = {part: weight.detach().narrow(AXES[part], len(KEEP), ADD).clone() for part, weight in parts.items()}
    states = {part: dense(optimizer, weight) for part, weight in parts.items()}
    second = [{part: draw[i] for part, draw in gradients(parts).items()} for i in range(STEPS)]
    take_steps(optimizer, parts, second)
    assert all(weight.isfinite().all() for weight in parts.values())

    twin = {part: nn.Parameter(torch.cat([starts[part], new[part]], AXES[part])) for part in parts}
    twin_optimizer = ALL[name](list(twin.values()))
    take_steps(twin_optimizer, twin, [spread(step, torch.arange(old), twin) for step in first])
    for part, axis in AXES.items():
        of_the_twin = dense(twin_optimizer, twin[part])
        assert states[part].keys() == before[part].keys() == of_the_twin.keys()
        for key, value in states[part].items():
            error = 0.15 if "4bit" in name else 0.05 if name in QUANTISED else 0.0
            tolerance = {"rtol": 0, "atol": error * before[part][key].abs().max() + 1e-7}  # Adamax adds its ε of 1e-8
            kept = before[part][key].index_select(axis, torch.tensor(KEEP))
            torch.testing.assert_close(value.narrow(axis, 0, len(KEEP)), kept, **tolerance)
            begun = of_the_twin[key].narrow(axis, old, ADD)
            torch.testing.assert_close(value.narrow(axis, len(KEEP), ADD), begun, **tolerance)
    if name in COUPLED or name in QUANTISED:
        return
    take_steps(twin_optimizer, twin, [spread(step, in_twin, twin) for step in second])
    exact = layer.A.dtype == torch.float64
    for part, weight in parts.items():
        expected = twin[part].detach().index_select(AXES[part], in_twin)
        torch.testing.assert_close(
            weight.detach(), expected, rtol=1e-12 if exact else 1e-6, atol=1e-14 if exact else 1e-7
        )


def spread(step: dict[str, Tensor], places: Tensor, like: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of some ranks, and zeros for the others."""
    return {
        part: torch.zeros_like(like[part]).index_copy(AXES[part], places, gradient) for part, gradient in step.items()
    }


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_before_training(name: str) -> None:
    _, layer = layer_for(name)
    with pytest.raises(OptimizerStateError, match=REFUSED[name] + ".*Use AdamW"):
        check_optimizer(ALL[name]([layer.A, layer.B]), [layer.A, layer.B])


def test_the_trainers_optimisers_are_really_here() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    assert {"optim=adafactor", "optim=adamw_torch_8bit", "optim=paged_ademamix_8bit"} <= OF_THE_TRAINER.keys()
    assert len(OF_THE_TRAINER) >= 20
