"""Adam for gates: PyTorch's own numbers, moments that follow a resize."""

from __future__ import annotations

import torch

from lorank.allocators.gate_adam import adam_step_, resize_adam_, start_adam


def gradient(seed: int, size: int = 9) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_numbers_are_pytorchs() -> None:
    values, twin = gradient(100), gradient(100).requires_grad_()
    state, optimizer = start_adam(values), torch.optim.Adam([twin], lr=0.1)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (1 + step)
        twin.grad = gradient(step)
        optimizer.step()
        adam_step_(values, gradient(step), state, lr)
        torch.testing.assert_close(values, twin.detach(), rtol=1e-12, atol=1e-14)


def test_moments_follow_a_resize() -> None:
    values = gradient(100)
    state = start_adam(values)
    for step in range(3):
        adam_step_(values, gradient(step), state, 0.1)
    before = state["adam.mean"].clone()
    resize_adam_(state, torch.tensor([4, -1, 0]))
    assert state["adam.mean"].tolist() == [before[4], 0, before[0]]
    adam_step_(values[:3].clone(), gradient(3, 3), state, 0.1)
    assert int(state["adam.step"]) == 4


def test_moments_are_made_beside_their_values_and_the_count_on_the_host() -> None:
    state = start_adam(torch.zeros(3, device="meta"))
    assert {name: tensor.device.type for name, tensor in state.items()} == {
        "adam.mean": "meta",
        "adam.square": "meta",
        "adam.step": "cpu",
    }
