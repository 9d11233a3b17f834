"""The gated LoRA in one autograd function, which equals :mod:`lorank.lora.variants.gated` and accesses less memory.

    y = W x + s · B (g ⊙ (A x))        z = A x

The arithmetic of a LoRA costs little (a few per cent of the layer). The cost is the number of times that n × d elements
are read and written. Therefore:

- The update is added in place to the output of the frozen base layer (linear map W).
- ∂B is computed as (zᵀ ∂y)ᵀ, because for few ranks ∂yᵀ z is several times slower. For this, z is stored as (r, n).
- The gate's gradient is Σ z ⊙ ∂z, at no further cost.
- The gradient through the base layer, ∂x = ∂y W, is computed here too where possible, and the LoRA's part is added to
  it in place.
- Dropout is a list of dropped positions (:mod:`lorank.lora.kernels.sparse_dropout`). In its backward pass, the LoRA's
  part is added everywhere, and then the base layer's values are restored at these positions.

Saved for the backward pass are x (after dropout) and z, the same as in PEFT without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorank.lora.kernels.onednn import linear
from lorank.lora.kernels.sparse_dropout import DroppedInput

Record = Callable[[Tensor, Tensor], None]
"""A function that a backward pass calls with z and its gradient, both (r, n). It must not change them."""


def fused_lora(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scaling: float,
    *,
    W: Tensor | None = None,
    dropped: DroppedInput | None = None,
    overwrite: bool = False,
    record: Record | None = None,
) -> Tensor:
    """``result`` + s · B (g ⊙ (A drop(x))).

    Args:
        result: the frozen base layer's output, (…, d_out).
        x: (…, d_in), before dropout.
        A: (r, d_in), B: (d_out, r), gate: (r,) or None for ones.
        scaling: s.
        W: the frozen weight, (d_out, d_in), if ``result`` is x Wᵀ + a constant. The gradient of x through W is then
            computed here, and ``result`` is detached from its graph. None: ``result`` keeps its graph.
        dropped: x after dropout, or None.
        overwrite: whether ``result``'s memory may be overwritten. No other code may read ``result`` afterwards.
        record: called in the backward pass with z and ∂loss/∂z; None: not at all.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    overwrite = overwrite and dtype == result.dtype and result.is_contiguous()
    positions = values = None
    if dropped is not None:
        scaling, positions, values = scaling / dropped.keep, dropped.positions, dropped.x.to(dtype)
    if W is not None and W.dtype == dtype == result.dtype:
        result = result.detach()
    else:
        W = None
    if gate is not None:
        gate = gate.to(device=x.device, dtype=dtype)
    with torch.autocast(kind, enabled=False):  # all operands have one dtype already
        output: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            result.to(dtype),
            x.to(dtype),
            A.to(dtype),
            B.to(dtype),
            gate,
            W,
            values,
            positions,
            scaling,
            overwrite,
            record,
        )
    return output


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        W: Tensor | None,
        values: Tensor | None,
        positions: Tensor | None,
        scaling: float,
        overwrite: bool,
        record: Record | None,
    ) -> Tensor:
        # An alias, not a view: autograd treats it as a new tensor. It shares its version counter with the old tensor,
        # so an operation that saved the old values detects the write.
        out = result.detach() if overwrite else result.clone(memory_format=torch.contiguous_format)
        kept = x.reshape(-1, x.shape[-1]) if values is None else values  # (n, d_in)
        z = linear(A, kept)  # (r, n)
        scaled = z * scaled_gate(gate, scaling)  # (r, n)
        out.view(-1, out.shape[-1]).addmm_(scaled.T, B.T)  # (n, d_out) += (n, r) (r, d_out)
        ctx.save_for_backward(kept, z, A, B, gate, W, positions)
        ctx.scaling, ctx.record = scaling, record
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients  # (…, d_out)
        kept, z, A, B, gate, W, positions = ctx.saved_tensors
        needs_result, needs_x, needs_A, needs_B, needs_gate = ctx.needs_input_grad[:5]
        factor = scaled_gate(gate, ctx.scaling)
        flat = dy.reshape(-1, dy.shape[-1])  # (n, d_out)
        dA = dB = dx = d_gate = None
        if needs_B:
            dB = linear(z * factor, flat.T).T  # (d_out, r), from (r, n) (n, d_out)
        dz = linear(B.T, flat)  # (r, n), the gradient of s · g ⊙ z
        if needs_gate:
            d_gate = (z * dz).sum(1) * ctx.scaling  # (r,)
        dz *= factor
        if ctx.record is not None:
            ctx.record(z, dz)
        if needs_A:
            dA = linear(dz, kept.T)  # (r, d_in)
        if needs_x:
            dx = input_gradient(flat, W, dz, A, positions).view(*dy.shape[:-1], A.shape[1])
        return dy if needs_result else None, dx, dA, dB, d_gate, None, None, None, None, None, None


def scaled_gate(gate: Tensor | None, scaling: float) -> Tensor | float:
    """s · g as a column (r, 1), which multiplies z (r, n); without a gate, s."""
    return scaling if gate is None else (gate * scaling).unsqueeze(1)


def input_gradient(dy: Tensor, W: Tensor | None, dz: Tensor, A: Tensor, positions: Tensor | None) -> Tensor:
    """∂x through the frozen base layer (if W is given) and through the LoRA, (n, d_in).

    Args:
        dy: (n, d_out), W: (d_out, d_in), dz: (r, n), A: (r, d_in).
        positions: the dropped positions of x, at which the LoRA's part is zero; None: no dropout.
    """
    if W is None:
        dx = dz.T @ A
        return dx if positions is None else dx.view(-1).scatter_(0, positions, 0).view_as(dx)
    dx = linear(dy, W.T)
    if positions is None:
        return dx.addmm_(dz.T, A)
    flat = dx.view(-1)
    frozen = flat.index_select(0, positions)
    dx.addmm_(dz.T, A)
    flat.scatter_(0, positions, frozen)
    return dx
