"""DoRA in one autograd function: what :mod:`lorank.lora.variants.dora` computes, without forming W + s B diag(g) A.

    y = b + f ⊙ (W x + u)                       f = m / ‖W + s B diag(g) A‖ per row,  u = s · B (g ⊙ (A x))
    y = b + W x + (f − 1) ⊙ W x̃ + f ⊙ ũ         with dropout, x̃ the dropped input: PEFT's DoRA drops it for W too

The norm is a constant in the backward pass. Without dropout the base layer's own output is all that is needed of W.
With it, W x̃ is a second product with W, of which only the difference to the first is computed where that is cheaper
(:mod:`lorank.lora.kernels.sparse_matmul`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorank.lora.kernels.lora import column, input_gradient
from lorank.lora.kernels.onednn import linear
from lorank.lora.kernels.sparse_dropout import Dropped
from lorank.lora.kernels.sparse_matmul import pattern, pays, product_at, subtract_product_


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
    dropped: Dropped | None = None,
    into: bool = False,
) -> Tensor:
    """The layer's output, (…, d_out). All operands have one dtype.

    Args:
        result: x Wᵀ + bias, (…, d_out); its own graph is let go, since the gradient through W is computed here.
        x: (…, d_in), before dropout.
        A: (r, d_in), B: (d_out, r), gate: (r,) or None for ones.
        scaling: s.
        magnitude: m, (d_out,).
        W: (d_out, d_in), bias: (d_out,) or None, both frozen.
        norm: (d_out,), :func:`row_norms`.
        dropped: x after dropout, or None.
        into: whether ``result``'s memory may be written over. Nobody else may read it afterwards.
    """
    values = None if dropped is None else dropped.x
    places = None if dropped is None else dropped.places
    keep = 1.0 if dropped is None else dropped.keep
    starts = columns = None
    if places is not None and pays(1 - keep, x):
        starts, columns = pattern(places, x.shape[:-1].numel(), x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):  # products in place are not autocast
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
            places,
            starts,
            columns,
            keep,
            scaling,
            into,
        )
    return output


@torch.no_grad()
def row_norms(W: Tensor, square: Tensor, A: Tensor, B: Tensor, scaling: float, gate: Tensor | None) -> Tensor:
    """‖W + s B diag(g) A‖ per output row, (d_out,), from the square expanded, which costs r rows of a product with W.

    Args:
        W: (d_out, d_in), square: its rows' Σ w², (d_out,).
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
        places: Tensor | None,
        starts: Tensor | None,
        columns: Tensor | None,
        keep: float,
        scaling: float,
        into: bool,
    ) -> Tensor:
        factor = magnitude / norm  # f, (d_out,)
        # An alias, not a view, as in the fused LoRA.
        out = (
            result.detach() if into and result.is_contiguous() else result.clone(memory_format=torch.contiguous_format)
        )
        flat = out.view(-1, out.shape[-1])  # (n, d_out)
        kept = x.reshape(-1, x.shape[-1]) if values is None else values  # (n, d_in)
        z = linear(A, kept)  # (r, n)
        scaled = z * column(gate, scaling)  # (r, n)
        if values is None:
            parts = flat.addmm_(scaled.T, B.T)  # W x + b + u
            out = out * factor if bias is None else torch.addcmul(bias - factor * bias, factor, out)
        else:
            # (1 − p) (W x̃ + ũ)
            if places is None or starts is None or columns is None:
                parts = linear(kept, W)
            else:
                parts = flat.clone() if bias is None else flat - bias
                subtract_product_(parts, x.reshape(kept.shape), W, places, starts, columns)
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
            places,
            starts,
            columns,
        )
        ctx.scaling, ctx.keep = scaling, keep
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients  # (…, d_out)
        kept, z, A, B, gate, W, factor, norm, bias, parts, places, starts, columns = ctx.saved_tensors
        keep = ctx.keep
        _, needs_x, needs_A, needs_B, needs_gate, needs_magnitude = ctx.needs_input_grad[:6]
        flat = dy.reshape(-1, dy.shape[-1])  # (n, d_out)
        dA = dB = dx = d_gate = d_magnitude = None
        if needs_magnitude:
            d_factor = (flat * parts).sum(0)  # (d_out,)
            if places is not None:
                d_factor = d_factor / keep
            elif bias is not None:
                d_factor = d_factor - bias * flat.sum(0)
            d_magnitude = d_factor / norm
        dt = flat * (factor / keep)  # (n, d_out), the gradient of u, or of (1 − p) ũ
        row = column(gate, ctx.scaling)  # (r, 1), or s
        if needs_B:
            dB = linear(z * row, dt.T).T  # (d_out, r)
        dz = linear(B.T, dt)  # (r, n)
        if needs_gate:
            d_gate = (z * dz).sum(1) * ctx.scaling  # (r,)
        dz *= row
        if needs_A:
            dA = linear(dz, kept.T)  # (r, d_in)
        if needs_x:
            if places is None:
                dx = input_gradient(dt, W, dz, A, None)
            elif starts is not None:
                # As if nothing had been dropped, and then the places where something was.
                dx = linear(dt.add_(flat, alpha=1 - 1 / keep), W.T).addmm_(dz.T, A)  # (n, d_in)
                dx.view(-1).index_copy_(0, places, product_at(flat, W, starts, columns))
            else:
                # W's part of x̃ is dropped with the LoRA's: (f − 1) ∂y / (1 − p) = dt − ∂y / (1 − p)
                through = linear(dt.sub_(flat, alpha=1 / keep), W.T).addmm_(dz.T, A)  # (n, d_in)
                through.view(-1).scatter_(0, places, 0)
                dx = linear(flat, W.T).add_(through)
            dx = dx.view(*dy.shape[:-1], A.shape[1])
        return None, dx, dA, dB, d_gate, d_magnitude, *[None] * 10
