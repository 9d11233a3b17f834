"""A LoRA per attention head, in one autograd function.

One pair of matrices holds all heads of a projection. Their ranks are concatenated in head order (R = Σ r_h), so the
rank axis is the first axis of A and the last axis of B, as in any LoRA:

    rows:     A: (R, d_in)   B: (d_h, R)      y[head h] += s · B[:, ranks of h] (g ⊙ A x)[ranks of h]
    columns:  A: (R, d_h)    B: (d_out, R)    y += s · B (g ⊙ z),   z[ranks of h] = A[ranks of h] x[head h]

The matrices hold the blocks of the heads only: d_in + d_h elements per rank for rows, d_h + d_out for columns. The
equivalent plain LoRA (:func:`dense_A`, :func:`dense_B`) has zeros outside the blocks and needs d_in + d_out.

On a CPU, the forward pass makes one product with the concatenated matrix and one in-place product per head with its
block. Saved for the backward pass are only x (after dropout) and z = A x. The gradient of x through the frozen base
layer (linear map W) is computed here too where possible, and dropout is a list of dropped positions; see
:mod:`lorank.lora.kernels.lora` for both. The gate's gradient is Σ z ⊙ ∂z, at no further cost. ∂B is computed as
(zᵀ ∂y)ᵀ, because for few ranks ∂yᵀ z is several times slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorank.errors import AdapterError
from lorank.lora.kernels.onednn import linear
from lorank.lora.kernels.sparse_dropout import DroppedInput


@dataclass(frozen=True)
class HeadGroups:
    """The heads of one projection.

    Args:
        kind: ``"rows"`` if a head owns rows of W, i.e. outputs (q, k, v); ``"columns"`` if a head owns columns of W,
            i.e. inputs (the output projection).
        count: H, the number of heads. ≥ 1.
        size: d_h, the width of a head. ≥ 1. ``count · size`` is d_out (rows) or d_in (columns).

    Raises:
        AdapterError: an argument is out of range.
    """

    kind: Literal["rows", "columns"]
    count: int
    size: int

    def __post_init__(self) -> None:
        if self.kind not in ("rows", "columns") or self.count < 1 or self.size < 1:
            raise AdapterError(
                f"HeadGroups(kind={self.kind!r}, count={self.count}, size={self.size}): expected 'rows' or 'columns', "
                "and a count and a size of at least 1"
            )

    def capacity(self, d_in: int, d_out: int) -> int:
        """The maximum rank of one head: the smaller dimension of its block of W."""
        return min(self.size, d_in if self.kind == "rows" else d_out)

    def span(self, head: int) -> slice:
        """The rows or columns of W that ``head`` owns."""
        return slice(head * self.size, (head + 1) * self.size)


def blocks(groups: HeadGroups, ranks: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yields, for every head with at least one rank, the rows or columns that it owns, and its ranks.

    Args:
        ranks: r_h of every head, (H,).
    """
    start = 0
    for head, rank in enumerate(ranks):
        if rank:
            yield groups.span(head), slice(start, start + rank)
        start += rank


@lru_cache(maxsize=1024)
def head_membership(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """(H, R) bool: whether a rank belongs to a head. Cached, because it only changes in a resize."""
    member = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))  # (R,)
    return (torch.arange(len(ranks)).unsqueeze(1) == member).to(device)


def dense_A(A: Tensor, groups: HeadGroups, ranks: Sequence[int]) -> Tensor:
    """A of the equivalent plain LoRA, (R, d_in). For columns, it is zero outside of each head's own columns."""
    if groups.kind == "rows":
        return A
    mine = head_membership(tuple(ranks), A.device).T.unsqueeze(2)  # (R, H, 1)
    return torch.where(mine, A.unsqueeze(1), 0).flatten(1)  # (R, H, d_h) → (R, d_in)


def dense_B(B: Tensor, groups: HeadGroups, ranks: Sequence[int]) -> Tensor:
    """B of the equivalent plain LoRA, (d_out, R). For rows, it is zero outside of each head's own rows."""
    if groups.kind == "columns":
        return B
    mine = head_membership(tuple(ranks), B.device).unsqueeze(1)  # (H, 1, R)
    return torch.where(mine, B, 0).flatten(0, 1)  # (H, d_h, R) → (d_out, R)


def compact_A(A: Tensor, groups: HeadGroups, ranks: Sequence[int]) -> Tensor:
    """The inverse of :func:`dense_A`: (R, d_in) → (R, d_h) for columns. Values outside the blocks are discarded."""
    if groups.kind == "rows":
        return A
    parts = [A[rank, own] for own, rank in blocks(groups, ranks)]  # (r_h, d_h) each
    return torch.cat(parts) if parts else A.new_zeros(0, groups.size)


def compact_B(B: Tensor, groups: HeadGroups, ranks: Sequence[int]) -> Tensor:
    """The inverse of :func:`dense_B`: (d_out, R) → (d_h, R) for rows. Values outside the blocks are discarded."""
    if groups.kind == "columns":
        return B
    parts = [B[own, rank] for own, rank in blocks(groups, ranks)]  # (d_h, r_h) each
    return torch.cat(parts, dim=1) if parts else B.new_zeros(groups.size, 0)


def per_head_dense(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scaling: float,
    groups: HeadGroups,
    ranks: Sequence[int],
) -> Tensor:
    """The obvious twin of :func:`per_head`: one plain LoRA with the dense, block-structured matrices, by autograd.

    On a CPU it is slower, the more so the more heads there are; on a GPU, where a product per head would be a launch
    per head, it is what :func:`per_head` does.
    """
    z = x @ dense_A(A, groups, ranks).T  # (…, R)
    if gate is not None:
        z = z * gate.to(device=z.device, dtype=z.dtype)
    return result + (z @ dense_B(B, groups, ranks).T) * scaling  # (…, d_out)


def per_head(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scaling: float,
    groups: HeadGroups,
    ranks: Sequence[int],
    *,
    W: Tensor | None = None,
    dropped: DroppedInput | None = None,
    overwrite: bool = False,
) -> Tensor:
    """``result`` + the update of all heads.

    Args:
        result: the frozen base layer's output, (…, d_out).
        x: (…, d_in).
        A: (R, d_in) for rows, (R, d_h) for columns.
        B: (d_h, R) for rows, (d_out, R) for columns.
        gate: (R,), or None: ones.
        scaling: s.
        groups: the heads.
        ranks: r_h of every head, (H,), Σ r_h = R.
        W: the frozen weight, (d_out, d_in), if ``result`` is x Wᵀ + a constant. The gradient of x through W is then
            computed here, and ``result`` is detached from its graph. None: ``result`` keeps its graph.
        dropped: x after dropout (on a CPU), or None.
        overwrite: whether ``result``'s memory may be overwritten, which saves a copy. No other code may read
            ``result`` afterwards.
    """
    kind = x.device.type
    if kind != "cpu":
        return per_head_dense(result, x, A, B, gate, scaling, groups, ranks)
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
    overwrite = overwrite and dtype == result.dtype and result.is_contiguous()
    positions = values = None
    if dropped is not None:
        scaling, positions, values = scaling / dropped.keep, dropped.positions, dropped.x.to(dtype)
    if W is not None and W.dtype == dtype == result.dtype:
        result = result.detach()
    else:
        W = None
    with torch.autocast(kind, enabled=False):  # in-place products are not autocast; all operands are cast here
        x, A, B, base = (tensor.to(dtype) for tensor in (x, A, B, result))
        gate = None if gate is None else gate.to(device=x.device, dtype=dtype)
        flat: Tensor = _PerHead.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            base.reshape(-1, base.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            A,
            B,
            gate,
            W,
            values,
            positions,
            scaling,
            groups,
            tuple(ranks),
            overwrite,
        )
    return flat.view(result.shape)


class _PerHead(torch.autograd.Function):
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
        groups: HeadGroups,
        ranks: tuple[int, ...],
        overwrite: bool,
    ) -> Tensor:
        """result: (n, d_out), x and values (x after dropout): (n, d_in)."""
        # An alias, not a view: see kernels/lora.py.
        out = result.detach() if overwrite else result.clone()
        x = x if values is None else values
        if groups.kind == "rows":
            z = x @ A.T  # (n, R)
            scaled = z * scaling if gate is None else z * (gate * scaling)  # (n, R)
            for own, rank in blocks(groups, ranks):
                out[:, own].addmm_(scaled[:, rank], B[:, rank].T)  # (n, d_h) += (n, r_h) (r_h, d_h)
        else:
            z = x.new_empty(len(x), len(A))  # (n, R)
            for own, rank in blocks(groups, ranks):
                torch.mm(x[:, own], A[rank].T, out=z[:, rank])  # (n, d_h) (d_h, r_h)
            scaled = z * scaling if gate is None else z * (gate * scaling)  # (n, R)
            out.addmm_(scaled, B.T)
        ctx.save_for_backward(x, z, A, B, gate, W, positions)
        ctx.scaling, ctx.groups, ctx.ranks = scaling, groups, ranks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients  # (n, d_out)
        x, z, A, B, gate, W, positions = ctx.saved_tensors
        groups, ranks = ctx.groups, ctx.ranks
        needs_x, needs_A, needs_B, needs_gate = ctx.needs_input_grad[1:5]
        factor = ctx.scaling if gate is None else gate * ctx.scaling  # s, or (R,)
        rows = groups.kind == "rows"
        d_scaled = torch.empty_like(z)  # (n, R), the gradient of s·g⊙z
        dA = dB = dx = d_gate = None
        if needs_B:
            transposed = B.new_empty(B.shape[1], B.shape[0])  # (R, d_h) or (R, d_out)
            scaled_T = (z * factor).T  # (R, n)
            if rows:
                for own, rank in blocks(groups, ranks):
                    torch.mm(scaled_T[rank], dy[:, own], out=transposed[rank])  # (r_h, n) (n, d_h)
            else:
                torch.mm(scaled_T, dy, out=transposed)
            dB = transposed.T
        if rows:
            for own, rank in blocks(groups, ranks):
                torch.mm(dy[:, own], B[:, rank], out=d_scaled[:, rank])  # (n, d_h) (d_h, r_h)
        else:
            torch.mm(dy, B, out=d_scaled)
        if needs_gate:
            d_gate = (z * d_scaled).sum(0) * ctx.scaling  # (R,)
        dz = d_scaled.mul_(factor)  # (n, R)
        if needs_A:
            if rows:
                dA = dz.T @ x  # (R, d_in)
            else:
                dA = torch.empty_like(A)  # (R, d_h)
                for own, rank in blocks(groups, ranks):
                    torch.mm(dz[:, rank].T, x[:, own], out=dA[rank])  # (r_h, n) (n, d_h)
        if needs_x:
            dx = _input_gradient(dy, W, dz, A, positions, groups, ranks, x.shape[1])
        return dy if ctx.needs_input_grad[0] else None, dx, dA, dB, d_gate, *[None] * 7


def _input_gradient(
    dy: Tensor,
    W: Tensor | None,
    dz: Tensor,
    A: Tensor,
    positions: Tensor | None,
    groups: HeadGroups,
    ranks: tuple[int, ...],
    d_in: int,
) -> Tensor:
    """∂x through the frozen base layer (if W is given) and through all heads, (n, d_in).

    Args:
        dy: (n, d_out), dz: (n, R).
        positions: the dropped positions of x, at which the heads' part is zero; None: no dropout.
    """
    dx = dy.new_zeros(len(dy), d_in) if W is None else linear(dy, W.T)
    frozen = None if W is None or positions is None else dx.view(-1).index_select(0, positions)
    if groups.kind == "rows":
        dx.addmm_(dz, A)
    else:
        for own, rank in blocks(groups, ranks):
            dx[:, own].addmm_(dz[:, rank], A[rank])  # (n, d_h) += (n, r_h) (r_h, d_h)
    if positions is not None:
        flat = dx.view(-1)
        flat.index_fill_(0, positions, 0) if frozen is None else flat.index_copy_(0, positions, frozen)
    return dx
