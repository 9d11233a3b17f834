"""The optimiser's state follows a resize, whatever the optimiser, and a state that does not fit is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from lorank.errors import OptimizerStateError
from lorank.lora import LayerPlan, check_state, find_layers, resize_, unwrap_optimizer
from lorank.lora.optimizer_state import plan_state_update
from tests.lora.forms import Q
from tests.lora.optimizers import OPTIMIZERS, train_step, trainable
from tests.models import adapted, tiny_llama, token_batch

FACTORED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adafactor_torch": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor_transformers": lambda p: Adafactor(p, lr=1e-2, relative_step=False, beta1=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_a_prune_equals_training_with_a_dead_rank_mask(name: str) -> None:
    """50 steps in float64: the pruned model against a twin whose dead ranks are zeroed after every step."""
    pruned = adapted(tiny_llama(), lora_dropout=0.0).double()
    twin = copy.deepcopy(pruned)
    optimizers = [OPTIMIZERS[name](trainable(model)) for model in (pruned, twin)]
    layers, twin_layers = find_layers(pruned), find_layers(twin)
    dead = {layer: [0, 2] for i, layer in enumerate(layers) if i % 2 == 0}
    for step in range(5):
        for model, optimizer in zip((pruned, twin), optimizers, strict=True):
            train_step(model, optimizer, token_batch(seed=step))
    resize_(layers, {layer: LayerPlan((1, 3)) for layer in dead}, optimizers[0])
    with torch.no_grad():
        for step in range(5, 55):
            for layer_name, ranks in dead.items():
                layer = twin_layers[layer_name]
                for parameter, index in ((layer.A, (ranks,)), (layer.B, (slice(None), ranks))):
                    for tensor in (parameter, *optimizers[1].state[parameter].values()):
                        if isinstance(tensor, Tensor) and tensor.dim() == 2:
                            tensor[index] = 0
            with torch.enable_grad():
                loss = train_step(pruned, optimizers[0], token_batch(seed=step))
                expected = train_step(twin, optimizers[1], token_batch(seed=step))
            assert loss == pytest.approx(expected, rel=1e-6)
    for layer_name, layer in layers.items():
        other = twin_layers[layer_name]
        alive = [rank for rank in range(4) if rank not in dead.get(layer_name, [])]
        torch.testing.assert_close(layer.A.data, other.A.data[alive], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.B.data, other.B.data[:, alive], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("rank", [1, 4])
def test_adafactors_factored_moments_follow(name: str, rank: int) -> None:
    """Kept entries bitwise, the axis without ranks untouched, also where rank 1 makes both layouts look alike."""
    model = adapted(tiny_llama(), r=rank)
    optimizer = FACTORED[name](trainable(model))
    layers = find_layers(model)
    train_step(model, optimizer, token_batch())
    layer = layers[Q]
    before = {
        p: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)} for p in (layer.A, layer.B)
    }
    keep = (rank - 1,)
    resize_(layers, {Q: LayerPlan(keep, 2)}, optimizer)
    row, column = ("row_var", "col_var") if "torch" in name else ("exp_avg_sq_row", "exp_avg_sq_col")
    of_A, of_B = optimizer.state[layer.A], optimizer.state[layer.B]
    assert torch.equal(of_A[row].flatten(), torch.cat([before[layer.A][row].flatten()[list(keep)], torch.zeros(2)]))
    assert torch.equal(of_A[column], before[layer.A][column])
    assert torch.equal(
        of_B[column].flatten(), torch.cat([before[layer.B][column].flatten()[list(keep)], torch.zeros(2)])
    )
    assert torch.equal(of_B[row], before[layer.B][row])
    assert torch.isfinite(torch.tensor([train_step(model, optimizer, token_batch(seed=i)) for i in range(3)])).all()


def test_eight_bit_adamw_follows() -> None:
    """Dequantised values of kept ranks agree within one step of the 8-bit code; training goes on."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # 8-bit state needs 4096 numbers in a parameter: 8 × 512 and 512 × 8 have just that.
    model = adapted(tiny_llama(hidden_size=512, intermediate_size=512), r=8)
    optimizer = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-3)
    layers = find_layers(model)
    for step in range(3):
        train_step(model, optimizer, token_batch(seed=step))
    layer = layers[Q]
    assert optimizer.state[layer.A]["state1"].dtype == torch.uint8
    before = {p: _dequantised(optimizer, p) for p in (layer.A, layer.B)}
    resize_(layers, {Q: LayerPlan((6, 1, 3, 0), 5)}, optimizer)
    for parameter, axis in ((layer.A, 0), (layer.B, 1)):
        for old, new in zip(before[parameter], _dequantised(optimizer, parameter), strict=True):
            kept = old.index_select(axis, torch.tensor([6, 1, 3, 0]))
            error = (new.narrow(axis, 0, 4) - kept).abs().max()
            assert error <= 0.02 * kept.abs().max()
            # The 8-bit code has no exact zero: its smallest value stands for it.
            assert new.narrow(axis, 4, 5).abs().max() <= 1e-4 * kept.abs().max()
    losses = [train_step(model, optimizer, token_batch(seed=3)) for _ in range(3)]
    assert losses[-1] < losses[0]
    resize_(layers, {Q: LayerPlan(())}, optimizer)
    train_step(model, optimizer, token_batch(seed=4))
    resize_(layers, {Q: LayerPlan((), 8)}, optimizer)
    train_step(model, optimizer, token_batch(seed=5))


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchaos_moments_follow_below_and_above_its_smallest_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment of fewer than 4,096 numbers is a plain tensor, as in a new optimiser."""
    optim = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = adapted(tiny_llama(1, hidden_size=1024, intermediate_size=8), r=5, target_modules=["q_proj", "v_proj"])
    optimizer = getattr(optim, kind)(trainable(model), lr=1e-3)
    layers = find_layers(model)
    layer = layers[Q]
    train_step(model, optimizer, token_batch())
    moments = optimizer.state[layer.A]
    own = type(moments["exp_avg"])
    assert own is not Tensor
    for plan, quantised in ((LayerPlan((4, 1, 2, 0)), True), (LayerPlan((1, 3)), False), (LayerPlan((1, 0), 2), False)):
        resize_(layers, {layer.name: plan}, optimizer)
        assert type(moments["exp_avg"]) is (own if quantised else Tensor)
        train_step(model, optimizer, token_batch())
        assert layer.A.isfinite().all()
    resize_(layers, {layer.name: LayerPlan(())}, optimizer)
    assert moments["exp_avg"].shape == (0, 1024)


def _dequantised(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    from bitsandbytes.functional import dequantize_blockwise

    state = optimizer.state[parameter]
    return [
        dequantize_blockwise(state[f"state{i}"], absmax=state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=256)
        for i in (1, 2)
    ]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_state_changes_only_when_the_planned_update_is_called(axis: int) -> None:
    parameter = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2)
    parameter.square().sum().backward()
    optimizer.step()
    state = optimizer.state[parameter]
    before = {name: value.clone() for name, value in state.items()}
    data = torch.zeros((4, 3) if axis == 0 else (3, 4))
    update = plan_state_update(optimizer, "lora_A", parameter, axis, torch.tensor([2, -1, 0, -1]), data)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    update()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name].select(axis, 0), before[name].select(axis, 2))
        assert torch.equal(state[name].select(axis, 2), before[name].select(axis, 0))
        assert not state[name].index_select(axis, torch.tensor([1, 3])).any()
    assert torch.equal(state["step"], before["step"])


def test_an_optimiser_without_a_state_needs_no_update() -> None:
    parameter = nn.Parameter(torch.zeros(3, 3))
    optimizer = torch.optim.SGD([parameter], lr=1e-2)
    plan_state_update(optimizer, "lora_A", parameter, 0, torch.tensor([0]), torch.zeros(1, 3))()
    assert not optimizer.state


@pytest.mark.parametrize("name", ["exp_avg", "row_var", "exp_avg_sq_col", "state1"])
def test_a_state_of_another_shape_than_its_parameter_is_refused(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.SGD([parameter], lr=1e-2)
    optimizer.state[parameter][name] = torch.zeros(5, 7, dtype=torch.uint8 if name == "state1" else torch.float32)
    with pytest.raises(OptimizerStateError, match=rf"state '{name}' of lora_A has shape \(5, 7\).*shape \(3, 4\)"):
        check_state(optimizer, "lora_A", parameter)


def test_the_torch_optimiser_inside_wrappers_is_found() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    assert unwrap_optimizer(inner) is inner
    assert unwrap_optimizer(Wrapper(Wrapper(inner))) is inner
    with pytest.raises(OptimizerStateError, match=r"expected a torch.optim.Optimizer .* got Wrapper"):
        unwrap_optimizer(Wrapper("adamw"))


SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "row_var", "col_var"} | {
    "exp_avg_sq_row",
    "exp_avg_sq_col",
}
MANY: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **OPTIMIZERS,
    **FACTORED,
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


@pytest.mark.parametrize("name", MANY)
def test_second_moments_of_new_ranks_begin_at_the_mean_of_the_kept_ones(name: str) -> None:
    """Every entry of the state against a twin that is resized as in a new optimiser; means by hand."""
    states: list[list[dict[str, Any]]] = []
    for second_moments in ("mean", "zero"):
        model = adapted(tiny_llama())
        optimizer, layers = MANY[name](trainable(model)), find_layers(model)
        for step in range(3):
            train_step(model, optimizer, token_batch(seed=step))
        resize_(layers, {Q: LayerPlan((2, 0), 2, places=(0, 3))}, optimizer, second_moments=second_moments)
        states.append([copy.deepcopy(dict(optimizer.state[weight])) for weight in (layers[Q].A, layers[Q].B)])
        assert math.isfinite(train_step(model, optimizer, token_batch(seed=9)))
    filled_entries = 0
    for axis, (filled, zero) in enumerate(zip(*states, strict=True)):
        assert filled.keys() == zero.keys()
        for key, value in filled.items():
            expected = zero[key]
            if key in SQUARES and isinstance(value, Tensor) and value.dim() and 4 in value.shape:
                rank_axis = list(value.shape).index(4)  # no other side of these layers is 4
                kept = expected.index_select(rank_axis, torch.tensor([1, 2]))
                mean = kept.double().mean(rank_axis, keepdim=True).to(value.dtype)
                assert bool((mean > 0).any())
                for new in (0, 3):
                    assert not torch.equal(value, expected)
                    torch.testing.assert_close(value.narrow(rank_axis, new, 1), mean)
                torch.testing.assert_close(value.index_select(rank_axis, torch.tensor([1, 2])), kept, rtol=0, atol=0)
                filled_entries += 1
            else:
                assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected, (axis, key)
    assert bool(filled_entries) == (name not in ("sgd", "sgd_momentum", "rprop"))


def test_a_module_without_kept_ranks_begins_at_zero_also_with_means() -> None:
    model = adapted(tiny_llama())
    optimizer, layers = OPTIMIZERS["adamw"](trainable(model)), find_layers(model)
    train_step(model, optimizer, token_batch())
    resize_(layers, {Q: LayerPlan((), 2)}, optimizer, second_moments="mean")
    assert not optimizer.state[layers[Q].A]["exp_avg_sq"].any()


def test_eight_bit_second_moments_begin_at_the_mean_too() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = adapted(tiny_llama(hidden_size=512, intermediate_size=512), r=8)
    optimizer, layers = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-3), find_layers(model)
    for step in range(3):
        train_step(model, optimizer, token_batch(seed=step))
    resize_(layers, {Q: LayerPlan((6, 1, 3, 0), 5)}, optimizer, second_moments="mean")
    for parameter, axis in ((layers[Q].A, 0), (layers[Q].B, 1)):
        first, second = _dequantised(optimizer, parameter)
        mean = second.narrow(axis, 0, 4).mean(axis, keepdim=True)
        error = (second.narrow(axis, 4, 5) - mean).abs().max()
        assert error <= 0.02 * second.max()
        assert first.narrow(axis, 4, 5).abs().max() < 1e-3 * first.abs().max()  # the smallest 8-bit code


def test_the_first_step_of_a_new_rank_is_no_jump_with_means() -> None:
    """Under a constant gradient, after 1000 steps: 2.5 times the learning rate at zero, a tenth of it at the mean."""
    steps = {}
    for second_moments in ("zero", "mean"):
        model = adapted(tiny_llama(layers=1), target_modules=["q_proj"])
        layers = find_layers(model)
        optimizer = torch.optim.AdamW([layers[Q].A, layers[Q].B], lr=1e-3, weight_decay=0)
        for _ in range(1000):
            layers[Q].A.grad, layers[Q].B.grad = torch.ones_like(layers[Q].A), torch.ones_like(layers[Q].B)
            optimizer.step()
        resize_(layers, {Q: LayerPlan((0, 1, 2, 3), 1)}, optimizer, second_moments=second_moments)
        layers[Q].A.grad, layers[Q].B.grad = torch.ones_like(layers[Q].A), torch.ones_like(layers[Q].B)
        before = layers[Q].B.detach().clone()
        optimizer.step()
        steps[second_moments] = float((layers[Q].B.detach() - before)[:, 4].abs().mean()) / 1e-3
    assert steps["zero"] == pytest.approx(0.1 * 632**0.5, rel=0.01)
    assert steps["mean"] == pytest.approx(0.1, rel=0.05)
