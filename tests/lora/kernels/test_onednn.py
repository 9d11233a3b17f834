"""oneDNN's products are the usual ones to rounding, on every layout; and nothing but the clock notices them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorank.errors import LorankError
from lorank.lora.kernels.onednn import FrozenLinear, disable_onednn_, enable_onednn_, linear, onednn_linear
from tests.quantised import BASES


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", [(64, 32, 48), (7, 5, 3), (1, 1, 1), (0, 4, 3), (5, 4, 0)])
def test_products_agree(sizes: tuple[int, int, int], turned: bool) -> None:
    n, d_in, d_out = sizes
    x = torch.randn(d_in, n).T if turned else torch.randn(n, d_in)
    W = torch.randn(d_in, d_out).T if turned else torch.randn(d_out, d_in)
    for bias in (None, torch.randn(d_out)):
        torch.testing.assert_close(linear(x, W, bias), F.linear(x, W, bias), rtol=1e-5, atol=1e-5)
    one_row = torch.randn(1, d_in).expand(n, d_in)  # the gradient of a sum
    torch.testing.assert_close(linear(one_row, W), F.linear(one_row, W), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_a_frozen_linear_keeps_its_values_and_gradients(shape: tuple[int, ...]) -> None:
    base = nn.Linear(6, 5).requires_grad_(False)
    quick = copy.deepcopy(base)
    enable_onednn_(quick)
    assert type(quick) is FrozenLinear
    x = torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(quick(x), base(x), rtol=1e-5, atol=1e-6)
    weights = torch.randn(*shape[:-1], 5)
    ours, theirs = (torch.autograd.grad((layer(x) * weights).sum(), x)[0] for layer in (quick, base))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert quick.state_dict().keys() == base.state_dict().keys()
    disable_onednn_(quick)
    assert type(quick) is nn.Linear


@pytest.mark.usefixtures("onednn")
def test_a_trained_frozen_linear_uses_the_default_product() -> None:
    layer = nn.Linear(6, 5)
    enable_onednn_(layer)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


@pytest.mark.usefixtures("onednn")
def test_other_precisions_are_left_alone() -> None:
    layer = nn.Linear(6, 5).double().requires_grad_(False)
    enable_onednn_(layer)
    assert type(layer) is nn.Linear
    layer = nn.Linear(6, 5).requires_grad_(False)
    enable_onednn_(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 6)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(3, 6).double()).dtype == torch.float64


@pytest.mark.usefixtures("onednn")
def test_a_frozen_linear_is_saved_and_copied() -> None:
    layer = nn.Linear(6, 5).requires_grad_(False)
    enable_onednn_(layer)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    x = torch.randn(3, 6)
    loaded = torch.load(stream, weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setenv("LORANK_ONEDNN", "0")
        onednn_linear.cache_clear()
        assert onednn_linear() is None
        layer = nn.Linear(6, 5)
        enable_onednn_(layer)
        assert type(layer) is nn.Linear
        monkeypatch.setenv("LORANK_ONEDNN", "yes")
        onednn_linear.cache_clear()
        with pytest.raises(LorankError, match="LORANK_ONEDNN='yes': expected 1"):
            onednn_linear()
    finally:
        onednn_linear.cache_clear()


def test_a_pytorch_without_the_operator_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Gone())
    onednn_linear.cache_clear()
    try:
        assert onednn_linear() is None
    finally:
        onednn_linear.cache_clear()


@pytest.mark.usefixtures("onednn")
def test_weights_of_another_class_are_left_alone() -> None:
    """torchao's quantised weights are in a plain nn.Linear and say that they are float32."""
    quantised = [layer for layer in BASES["torchao8"]().modules() if type(layer) is nn.Linear]
    foreign = [layer for layer in quantised if type(layer.weight) is not nn.Parameter]
    assert any(layer.weight.dtype == torch.float32 for layer in foreign)
    for layer in foreign:
        enable_onednn_(layer)
        assert type(layer) is nn.Linear
