"""The gated LoRA in one autograd function: what :mod:`lorank.lora.variants.gated` computes, in fewer passes over
memory.

    y = W x + s · B (g ⊙ (A x))

A LoRA's cost is not its arithmetic (a few per cent) but how often n × d numbers go through memory. So here

- the update is added into the frozen map's output, not beside it;
- ∂B is computed as (zᵀ ∂y)ᵀ: for few ranks, ∂yᵀ z is several times slower; z is kept rank-major, (r, n), for that;
- the gate's gradient is Σ z ⊙ ∂z, which costs nothing more;
- the frozen map's own ∂x = ∂y W is computed here too where that is possible, and the LoRA's part is added into it;
- dropout is a list of places (:mod:`lorank.lora.kernels.sparse_dropout`): putting the frozen map's values back at those
  places, after the LoRA's part was added, is its backward pass.

Saved for the backward pass are x (after dropout) and z, as PEFT does without dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorank.lora.kernels.onednn import linear
from lorank.lora.kernels.sparse_dropout import Dropped


def fused_lora(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scaling: float,
    *,
    W: Tensor | None = None,
    dropped: Dropped | None = None,
    into: bool = False,
) -> Tensor:
    """``result`` + s · B (g ⊙ (A drop(x))).

    Args:
        result: the frozen map's output, (…, d_out).
        x: (…, d_in), before dropout.
        A: (r, d_in), B: (d_out, r), gate: (r,) or None for ones.
        scaling: s.
        W: the frozen weight, (d_out, d_in), if ``result`` is x Wᵀ + a constant: the gradient that x has through it is
            then computed here, and ``result``'s own graph is let go. None: ``result`` keeps its graph.
        dropped: x after dropout, or None.
        into: whether ``result``'s memory may be written over. Nobody else may read it afterwards.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    into = into and dtype == result.dtype and result.is_contiguous()
    places = values = None
    if dropped is not None:
        scaling, places, values = scaling / dropped.keep, dropped.places, dropped.x.to(dtype)
    if W is not None and W.dtype == dtype == result.dtype:
        result = result.detach()
    else:
        W = None
    if gate is not None:
        gate = gate.to(device=x.device, dtype=dtype)
    with torch.autocast(kind, enabled=False):  # everything has one dtype before
        output: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            result.to(dtype), x.to(dtype), A.to(dtype), B.to(dtype), gate, W, values, places, scaling, into
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
        places: Tensor | None,
        scaling: float,
        into: bool,
    ) -> Tensor:
        # An alias, not a view: autograd takes it for a fresh tensor, and an operation that saved the old values
        # notices the write by the version that they share.
        out = result.detach() if into else result.clone(memory_format=torch.contiguous_format)
        kept = x.reshape(-1, x.shape[-1]) if values is None else values  # (n, d_in)
        z = linear(A, kept)  # (r, n)
        scaled = z * column(gate, scaling)  # (r, n)
        out.view(-1, out.shape[-1]).addmm_(scaled.T, B.T)  # (n, d_out) += (n, r) (r, d_out)
        ctx.save_for_backward(kept, z, A, B, gate, W, places)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients  # (…, d_out)
        kept, z, A, B, gate, W, places = ctx.saved_tensors
        needs_result, needs_x, needs_A, needs_B, needs_gate = ctx.needs_input_grad[:5]
        factor = column(gate, ctx.scaling)
        flat = dy.reshape(-1, dy.shape[-1])  # (n, d_out)
        dA = dB = dx = d_gate = None
        if needs_B:
            dB = linear(z * factor, flat.T).T  # (d_out, r), from (r, n) (n, d_out)
        dz = linear(B.T, flat)  # (r, n), the gradient of s · g ⊙ z
        if needs_gate:
            d_gate = (z * dz).sum(1) * ctx.scaling  # (r,)
        dz *= factor
        if needs_A:
            dA = linear(dz, kept.T)  # (r, d_in)
        if needs_x:
            dx = input_gradient(flat, W, dz, A, places).view(*dy.shape[:-1], A.shape[1])
        return dy if needs_result else None, dx, dA, dB, d_gate, None, None, None, None, None


def column(gate: Tensor | None, scaling: float) -> Tensor | float:
    """s · g as a column, (r, 1), which multiplies z (r, n); or s."""
    return scaling if gate is None else (gate * scaling).unsqueeze(1)


def input_gradient(dy: Tensor, W: Tensor | None, dz: Tensor, A: Tensor, places: Tensor | None) -> Tensor:
    """∂x of the frozen map (if W is given) and of the LoRA, (n, d_in).

    Args:
        dy: (n, d_out), W: (d_out, d_in), dz: (r, n), A: (r, d_in).
        places: where x was dropped: there the LoRA has no part.
    """
    if W is None:
        dx = dz.T @ A
        return dx if places is None else dx.view(-1).scatter_(0, places, 0).view_as(dx)
    dx = linear(dy, W.T)
    if places is None:
        return dx.addmm_(dz.T, A)
    flat = dx.view(-1)
    frozen = flat.index_select(0, places)
    dx.addmm_(dz.T, A)
    flat.scatter_(0, places, frozen)
    return dx
