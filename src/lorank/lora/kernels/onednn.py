"""Matrix products on a CPU by the faster of two libraries: oneDNN, or MKL, which PyTorch uses by default.

On AMD processors oneDNN's float32 product is about twice as fast as MKL's. PyTorch contains oneDNN, but calls it for
float32 only through a private operator of its compiler (``mkldnn._linear_pointwise``). So this operator is looked up,
tested and timed once per process. If it is missing, gives other results or is hardly faster,
:func:`torch.nn.functional.linear` is used.

The environment variable ``LORANK_ONEDNN`` replaces the timing: 1 (use oneDNN where it works) or 0 (never). A run that
is resumed on another kind of processor, where the timing may choose the other library, is exact up to rounding.

Both libraries compute in float32 and sum in different orders, so their results agree up to rounding.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorank.errors import LorankError

# The minimum speedup. It is well above 1, so that a restarted process makes the same choice.
_MIN_SPEEDUP = 1.3
# oneDNN compiles a kernel per shape, which takes about 0.5 ms. Smaller products save too little time to make up for
# this if the length of batches varies.
_MIN_MULTIPLICATIONS = 4_000_000


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, without autograd. x: (n, d_in), W: (d_out, d_in), both of any strides; bias: (d_out,)."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) * W.numel() >= _MIN_MULTIPLICATIONS:
        fast = onednn_linear()
        if fast is not None:
            return fast(x, W, bias)
    return F.linear(x, W, bias)


@functools.cache
def onednn_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """oneDNN's x Wᵀ + bias in float32 on this CPU, or None if it is missing, wrong or less than 30 % faster.

    Raises:
        LorankError: ``LORANK_ONEDNN`` is neither 0 nor 1.
    """
    setting = os.environ.get("LORANK_ONEDNN", "")
    if setting not in ("", "0", "1"):
        raise LorankError(f"LORANK_ONEDNN={setting!r}: expected 1 (use oneDNN's products), 0 (never), or nothing")
    if setting == "0" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped in torch
        return None

    def fast(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
        return product

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x, W = (torch.randn(shape, generator=generator) for shape in ((256, 512), (512, 512)))
        bias = torch.randn(512, generator=generator)
        try:
            correct = all(
                torch.allclose(fast(x, V, b), F.linear(x, V, b), rtol=1e-4, atol=1e-3)
                for V, b in ((W, bias), (W, None), (W.T, None))
            )
        except (AttributeError, RuntimeError, TypeError, NotImplementedError):  # absent or changed in another PyTorch
            return None
        if not correct:
            return None
        if setting == "1" or _speedup(fast, F.linear, x, W, bias) > _MIN_SPEEDUP:
            return fast
    return None


def _speedup(fast: Callable[..., Tensor], default: Callable[..., Tensor], *operands: Tensor) -> float:
    """How many times faster ``fast`` is. The calls alternate, and the shortest time of each counts: the least noisy."""
    best = [math.inf, math.inf]
    for _ in range(12):
        for i, product in enumerate((fast, default)):
            began = time.perf_counter()
            product(*operands)
            best[i] = min(best[i], time.perf_counter() - began)
    return best[1] / best[0]


class FrozenLinear(nn.Linear):
    """A frozen ``nn.Linear`` computed by :func:`linear`. Made by :func:`enable_onednn_`, never by hand."""

    def forward(self, input: Tensor) -> Tensor:
        plain = (
            self.weight.requires_grad
            or (self.bias is not None and self.bias.requires_grad)
            or torch.is_autocast_enabled(input.device.type)
            or torch.compiler.is_compiling()
            or input.dtype != torch.float32
        )
        if plain:
            return F.linear(input, self.weight, self.bias)
        output: Tensor = _Frozen.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]  # untyped in torch
        return output


def enable_onednn_(base: nn.Module) -> None:
    """Turns a plain float32 ``nn.Linear`` on a CPU into a :class:`FrozenLinear`, in place, if oneDNN is faster.

    Only the class changes; parameters, hooks and names stay. Other modules are unchanged. :func:`disable_onednn_`
    reverses this.
    """
    W = base.weight if type(base) is nn.Linear else None
    # torchao's quantised weights and sharded weights report float32 too, but have other classes.
    fits = type(W) is nn.Parameter and W.device.type == "cpu" and W.dtype == torch.float32
    if fits and onednn_linear() is not None:
        base.__class__ = FrozenLinear


def disable_onednn_(base: nn.Module) -> None:
    """The inverse of :func:`enable_onednn_`."""
    if type(base) is FrozenLinear:
        base.__class__ = nn.Linear  # type: ignore[assignment]  # same layout, see enable_onednn_


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """x: (…, d_in)."""
        ctx.save_for_backward(W)
        return linear(x.reshape(-1, x.shape[-1]), W, bias).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients  # (…, d_out)
        (W,) = ctx.saved_tensors
        dx = linear(dy.reshape(-1, dy.shape[-1]), W.T)  # (n, d_in)
        return dx.view(*dy.shape[:-1], W.shape[1]), None, None
