"""DoRA in one autograd function: the same result as :mod:`lorank.lora.variants.dora`, without W + s B diag(g) A.

    y = b + f ⊙ (W x + u)                       f = m / ‖W + s B diag(g) A‖ per row,  u = s · B (g ⊙ (A x))
    y = b + W x + (f − 1) ⊙ W x̃ + f ⊙ ũ         with dropout: x̃ is the dropped input, which PEFT's DoRA also uses for W

The norm is a constant in the backward pass. Without dropout, the forward pass needs only the base layer's output, not
W. With dropout, W x̃ is a second product with W. Where it is cheaper, only its difference to the first product is
computed (:mod:`lorank.lora.kernels.sparse_matmul`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorank.lora.kernels.lora import Record, input_gradient, scaled_gate
from lorank.lora.kernels.onednn import linear
from lorank.lora.kernels.sparse_dropout import DroppedInput
from lorank.lora.kernels.sparse_matmul import csr_indices, is_sparse_faster, product_at_positions, subtract_product_


def fused_dora(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scaling: float,
    magnitude: Tensor,
    W: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    *,
    dropped: DroppedInput | None = None,
    overwrite: bool = False,
    record: Record | None = None,
) -> Tensor:
    """The layer's output, (…, d_out). All operands have one dtype.

    Args:
        result: x Wᵀ + bias, (…, d_out). It is detached from its graph, because the gradient through W is computed here.
        x: (…, d_in), before dropout.
        A: (r, d_in), B: (d_out, r), gate: (r,) or None for ones.
        scaling: s.
        magnitude: m, (d_out,).
        W: (d_out, d_in), bias: (d_out,) or None, both frozen.
        norm: (d_out,), :func:`row_norms`.
        dropped: x after dropout, or None.
        overwrite: whether ``result``'s memory may be overwritten. No other code may read ``result`` afterwards.
        record: called in the backward pass with z and ∂loss/∂z; None: not at all.
    """
    values = None if dropped is None else dropped.x
    positions = None if dropped is None else dropped.positions
    keep = 1.0 if dropped is None else dropped.keep
    starts = columns = None
    if positions is not None and is_sparse_faster(1 - keep, x):
        starts, columns = csr_indices(positions, x.shape[:-1].numel(), x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):  # in-place products are not autocast
        output: Tensor = _FusedDora.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            result.detach(),
            x,
            A,
            B,
            gate,
            magnitude,
            W,
            bias,
            norm,
            values,
            positions,
            starts,
            columns,
            keep,
            scaling,
            overwrite,
            record,
        )
    return output


@torch.no_grad()
def row_norms(W: Tensor, square: Tensor, A: Tensor, B: Tensor, scaling: float, gate: Tensor | None) -> Tensor:
    """‖W + s B diag(g) A‖ per output row, (d_out,).

    The square is expanded, so that the cost is a product of W with the r rows of A.

    Args:
        W: (d_out, d_in), square: Σ w² of each row of W, (d_out,).
        A: (r, d_in), B: (d_out, r), gate: (r,) or None.
    """
    gated = B if gate is None else B * gate  # (d_out, r)
    cross = linear(A, W).T  # (d_out, r)
    total = (gated * (2 * scaling * cross + gated @ (A @ A.T) * scaling**2)).sum(1)  # (d_out,)
    return total.add_(square).clamp_min_(0).sqrt_()


class _FusedDora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        magnitude: Tensor,
        W: Tensor,
        bias: Tensor | None,
        norm: Tensor,
        values: Tensor | None,
        positions: Tensor | None,
        starts: Tensor | None,
        columns: Tensor | None,
        keep: float,
        scaling: float,
        overwrite: bool,
        record: Record | None,
    ) -> Tensor:
        factor = magnitude / norm  # f, (d_out,)
        # An alias, not a view: see kernels/lora.py.
        out = (
            result.detach()
            if overwrite and result.is_contiguous()
            else result.clone(memory_format=torch.contiguous_format)
        )
        flat = out.view(-1, out.shape[-1])  # (n, d_out)
        kept = x.reshape(-1, x.shape[-1]) if values is None else values  # (n, d_in)
        z = linear(A, kept)  # (r, n)
        scaled = z * scaled_gate(gate, scaling)  # (r, n)
        if values is None:
            parts = flat.addmm_(scaled.T, B.T)  # W x + b + u
            out = out * factor if bias is None else torch.addcmul(bias - factor * bias, factor, out)
        else:
            # (1 − p) (W x̃ + ũ)
            if positions is None or starts is None or columns is None:
                parts = linear(kept, W)
            else:
                parts = flat.clone() if bias is None else flat - bias
                subtract_product_(parts, x.reshape(kept.shape), W, positions, starts, columns)
            parts.addmm_(scaled.T, B.T)
            flat.addmm_(scaled.T, B.T, alpha=1 / keep).addcmul_(parts, (factor - 1) / keep)
        ctx.save_for_backward(
            kept,
            z,
            A,
            B,
            gate,
            W,
            factor,
            norm,
            bias,
            parts if ctx.needs_input_grad[5] else None,
            positions,
            starts,
            columns,
        )
        ctx.scaling, ctx.keep, ctx.record = scaling, keep, record
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients  # (…, d_out)
        kept, z, A, B, gate, W, factor, norm, bias, parts, positions, starts, columns = ctx.saved_tensors
        keep = ctx.keep
        _, needs_x, needs_A, needs_B, needs_gate, needs_magnitude = ctx.needs_input_grad[:6]
        flat = dy.reshape(-1, dy.shape[-1])  # (n, d_out)
        dA = dB = dx = d_gate = d_magnitude = None
        if needs_magnitude:
            d_factor = (flat * parts).sum(0)  # (d_out,)
            if positions is not None:
                d_factor = d_factor / keep
            elif bias is not None:
                d_factor = d_factor - bias * flat.sum(0)
            d_magnitude = d_factor / norm
        dt = flat * (factor / keep)  # (n, d_out), the gradient of u, or of (1 − p) ũ
        row = scaled_gate(gate, ctx.scaling)  # (r, 1), or s
        if needs_B:
            dB = linear(z * row, dt.T).T  # (d_out, r)
        dz = linear(B.T, dt)  # (r, n)
        if needs_gate:
            d_gate = (z * dz).sum(1) * ctx.scaling  # (r,)
        dz *= row
        if ctx.record is not None:
            ctx.record(z, dz)
        if needs_A:
            dA = linear(dz, kept.T)  # (r, d_in)
        if needs_x:
            if positions is None:
                dx = input_gradient(dt, W, dz, A, None)
            elif starts is not None:
                # First ∂x without dropout, then the correct values at the dropped positions.
                dx = linear(dt.add_(flat, alpha=1 - 1 / keep), W.T).addmm_(dz.T, A)  # (n, d_in)
                dx.view(-1).index_copy_(0, positions, product_at_positions(flat, W, starts, columns))
            else:
                # Dropout applies to both gradients of x̃. Through W it is (f − 1) ∂y / (1 − p) = dt − ∂y / (1 − p).
                through = linear(dt.sub_(flat, alpha=1 / keep), W.T).addmm_(dz.T, A)  # (n, d_in)
                through.view(-1).scatter_(0, positions, 0)
                dx = linear(flat, W.T).add_(through)
            dx = dx.view(*dy.shape[:-1], A.shape[1])
        return None, dx, dA, dB, d_gate, d_magnitude, *[None] * 11
