"""Matrix products on a CPU, by whichever library is the faster there: MKL, which PyTorch calls, or oneDNN.

On AMD processors oneDNN's product in float32 is about twice as fast as MKL's. PyTorch ships oneDNN, but calls it for
float32 only through an operator of its compiler (``mkldnn._linear_pointwise``, private). So it is looked for, tried
and timed once per process; where it is missing, differs or gains little, everything is
:func:`torch.nn.functional.linear`.
The environment variable ``LORANK_ONEDNN`` decides instead of the clock: 1 (where it works) or 0 (never). A run that is
resumed on another kind of processor, where the clock may decide otherwise, is exact to rounding.

Both compute in float32 and sum in another order: results agree to rounding. Nothing else changes.
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

# The least gain that counts: well away from 1, so that a process that is started again decides alike.
_GAIN = 1.3
# oneDNN compiles a kernel per shape, about 0.5 ms, which products of fewer multiplications take long to win back where
# batches vary in length.
_SMALLEST = 4_000_000


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, outside any graph. x: (n, d_in), W: (d_out, d_in), both of any strides; bias: (d_out,)."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) * W.numel() >= _SMALLEST:
        fast = onednn_linear()
        if fast is not None:
            return fast(x, W, bias)
    return F.linear(x, W, bias)


@functools.cache
def onednn_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """oneDNN's x Wᵀ + bias in float32 on this CPU, or None where it is missing or gains less than 30 %.

    Raises:
        LorankError: ``LORANK_ONEDNN`` is neither 0 nor 1.
    """
    wish = os.environ.get("LORANK_ONEDNN", "")
    if wish not in ("", "0", "1"):
        raise LorankError(f"LORANK_ONEDNN={wish!r}: expected 1 (use oneDNN's products), 0 (never), or nothing")
    if wish == "0" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped in torch
        return None

    def fast(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
        return product

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x, W = (torch.randn(shape, generator=generator) for shape in ((256, 512), (512, 512)))
        bias = torch.randn(512, generator=generator)
        try:
            right = all(
                torch.allclose(fast(x, V, b), F.linear(x, V, b), rtol=1e-4, atol=1e-3)
                for V, b in ((W, bias), (W, None), (W.T, None))
            )
        except (AttributeError, RuntimeError, TypeError, NotImplementedError):  # another PyTorch: gone, or changed
            return None
        if not right:
            return None
        if wish == "1" or _gain(fast, F.linear, x, W, bias) > _GAIN:
            return fast
    return None


def _gain(fast: Callable[..., Tensor], usual: Callable[..., Tensor], *operands: Tensor) -> float:
    """How many times faster the one is, by the fastest of several, in turns: when nothing disturbs the machine."""
    best = [math.inf, math.inf]
    for _ in range(12):
        for i, product in enumerate((fast, usual)):
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
    """A plain ``nn.Linear`` in float32 on a CPU where oneDNN gains becomes a :class:`FrozenLinear`, in place.

    Parameters, hooks and names stay: only the class changes. Other modules are left as they are.
    :func:`disable_onednn_` is the way back.
    """
    W = base.weight if type(base) is nn.Linear else None
    # torchao's quantised weights and sharded ones are of other classes, and still say float32.
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
