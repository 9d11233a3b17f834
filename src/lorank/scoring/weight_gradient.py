"""The largest singular values and vectors of ∂L/∂W of frozen weights, from a few batches. They show where, and in which
directions, a low-rank update reduces the loss most.

Autograd does not compute this gradient. A layer y = W x with inputs x and output gradients dy (one row per token) has

    G = ∂L/∂W = Σ_tokens dy xᵀ          (d_out, d_in)

so hooks on x and dy are enough. No ``.grad`` is needed on the base model, whose weights may be quantised. Small
matrices are summed in full. For larger ones a randomised range finder (Halko, Martinsson & Tropp, SIAM Review 2011,
algorithm 4.1) takes two passes over the batches and stores (k + p)(d_in + d_out) numbers, for k singular values and
p = 8 additional columns:

    Y = G Ω = Σ dy (xᵀ Ω),  Q = orth(Y)          Z = Qᵀ G = Σ (Qᵀ dy) xᵀ,   σ(Z) ≈ σ(G), never above
    Z = U Σ Vᵀ                                   G ≈ (Q U) Σ Vᵀ

The residual gradient is the part that an adapter does not reach yet: G (I − P), with P the projection onto the row
space of A. A new row of A is of use as far as it lies outside of this space. In an embedding it is (I − P) G, with P
the projection onto the column space of B. A LoRA per head has a residual gradient in each head's block of G. A
parameter with experts has one G per expert (:mod:`lorank.scoring.expert_gradient`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lorank.errors import ValidationBatchError
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.scoring.expert_gradient import ExpertGradientSum
from lorank.scoring.loss import LossFn, loss_gradients, loss_with_graph, prepare_batch, require_finite, unwrap_model
from lorank.scoring.patches import tokens_of
from lorank.scoring.preserve_state import preserve_state

OVERSAMPLING = 8
FULL_GRADIENT_SIZE = 2**18
"""A gradient of at most this many numbers (1 MiB in float32) is summed in full; its singular values are exact."""
ROUNDING = 1e-6
"""Singular values below this part of the whole are the rounding of float32 sums."""


@dataclass(frozen=True)
class WeightGradient:
    """The largest part of G = ∂L/∂W of one layer: G ≈ left · diag(values) · rightᵀ.

    Attributes:
        values: σ, (k,) float64, descending.
        left: (d_out, k) float64, orthonormal columns, also where values are zero. With experts, the vectors of all of
            them below each other, orthonormal in each.
        right: (d_in, k) float64, as ``left``.
    """

    values: Tensor
    left: Tensor
    right: Tensor


def weight_gradients(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Sequence[Mapping[str, Any]],
    count: int,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, WeightGradient]:
    """The largest part of the gradient of the mean loss over ``batches``, in evaluation mode.

    The model is restored afterwards; no ``.grad`` is written.

    Args:
        model: the model that the layers belong to.
        layers: its LoRA layers. Their update is part of the model; it is zero for a fresh adapter.
        batches: one or more batches, each with the arguments of the model's forward, including ``labels``.
        count: k, the most singular values per layer; at most min(d_in, d_out) are returned.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``.
        seed: seed of the random directions Ω; the global random state is neither read nor changed.
        mean: the mean of a tensor (n,) over all processes, :meth:`lorank.scoring.Context.mean`; None: there is one.

    Returns:
        Per layer the k largest singular values and their vectors, on the CPU. For a layer that the loss does not
        depend on, the values are zero, and the vectors any orthonormal ones.

    Raises:
        ValidationBatchError: there is no batch; or a batch has no labels, no loss, or a loss that is NaN or infinite.
    """
    if not batches:
        raise ValidationBatchError("there is no batch to take gradients on: give at least one")
    sums: dict[str, list[_Sum]] = {}
    for index, (name, layer) in enumerate(layers.items()):
        own_seed = seed * 1_000_003 + index
        if layer.is_expert:
            sums[name] = [_of_experts(layer, count, own_seed)]
        else:
            sums[name] = [_GradientSum(block, count, own_seed) for block in _blocks(layer)]
    _sum_gradients(model, layers, batches, sums, loss_fn, mean)
    return {name: _combined([_decompose(one, len(batches)) for one in own]) for name, own in sums.items()}


def residual_gradients(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Sequence[int]],
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, dict[int, WeightGradient]]:
    """The largest part of the residual gradient, which the present ranks do not reach, at the present weights.

    Like :func:`weight_gradients`, for some layers. Gates of the layers are part of the model.

    Args:
        counts: per layer, the number of singular values for each of its groups: a layer in per-head form has a group
            per head, every other layer has one. Groups with 0 are left out.

    Returns:
        Per layer and index of the group. For a head, the vectors are of the width of its block: ``left`` (d_h, k) for
        rows, ``right`` (d_h, k) for columns. ``right`` is orthogonal to the rows of the group's A; for an embedding,
        ``left`` is orthogonal to the columns of B. Values at rounding error are set to zero.

    Raises:
        ValidationBatchError: see :func:`weight_gradients`.
    """
    if not batches:
        raise ValidationBatchError("there is no batch to take gradients on: give at least one")
    index = 0
    sums: dict[str, dict[int, list[_Sum]]] = {}
    for name, of_groups in counts.items():
        sums[name] = {}
        if layers[name].is_expert:
            if of_groups[0]:
                own_seed = seed * 1_000_003 + index
                sums[name][0] = [_of_experts(layers[name], of_groups[0], own_seed, residual=True)]
                index += 1
            continue
        blocks = _residual_blocks(layers[name])
        limit = FULL_GRADIENT_SIZE // sum(map(len, blocks))
        for group, count in enumerate(of_groups):
            if count:
                own_seed = seed * 1_000_003 + index
                sums[name][group] = [_GradientSum(block, count, own_seed, limit) for block in blocks[group]]
                index += 1
    flat = {name: [one for own in groups.values() for one in own] for name, groups in sums.items()}
    _sum_gradients(model, layers, batches, flat, loss_fn, mean)
    return {
        name: {group: _combined([_decompose(one, len(batches)) for one in own]) for group, own in groups.items()}
        for name, groups in sums.items()
    }


def _combined(parts: Sequence[WeightGradient]) -> WeightGradient:
    """The gradients of a convolution's groups as one: its i-th vectors are the i-th ones of all groups, at one norm."""
    if len(parts) == 1:
        return parts[0]
    share = len(parts) ** -0.5
    values = torch.stack([one.values for one in parts]).square().sum(0).sqrt()
    left, right = torch.cat([one.left for one in parts]), torch.cat([one.right for one in parts])
    return WeightGradient(values, left * share, right * share)


def _sum_gradients(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Sequence[Mapping[str, Any]],
    sums: Mapping[str, Sequence[_Sum]],
    loss_fn: LossFn | None,
    mean: Callable[[Tensor], Tensor] | None,
) -> None:
    """Runs the passes that fill ``sums``."""
    model = unwrap_model(model)
    every = [one for own in sums.values() for one in own]
    passes = 1 if all(one.is_whole for one in every) else 2
    with preserve_state(model, layers), torch.enable_grad(), _gradient_hooks(layers, sums) as leaves:
        for _ in range(passes):
            for batch in batches:
                loss = loss_with_graph(model, prepare_batch(model, batch, needs_labels=loss_fn is None), loss_fn)
                require_finite(loss.detach(), "the model")
                loss_gradients(loss, leaves)
            for one in every:
                one.end_pass(mean)


@dataclass(frozen=True)
class _Block:
    """A block of a layer's W.

    Args:
        rows, columns: its place in W.
        is_embedding: whether x holds token ids.
        reached: (d_in, r) float64, or (d_out, r) for an embedding: orthonormal columns, the directions that the ranks
            have already. They are taken out of G. None: none are.
    """

    rows: slice
    columns: slice
    is_embedding: bool = False
    reached: Tensor | None = None

    @property
    def d_in(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def d_out(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def outside(self, values: Tensor, axis: int) -> Tensor:
        """``values``, float64, without the directions that are reached, if these are of axis ``axis`` of G."""
        if self.reached is None or axis != (0 if self.is_embedding else 1):
            return values
        return values - self.reached @ (self.reached.T @ values)


_Sum: TypeAlias = "_GradientSum | ExpertGradientSum"


def _of_experts(layer: AdapterLayer, count: int, seed: int, *, residual: bool = False) -> ExpertGradientSum:
    return ExpertGradientSum(
        layer,
        count,
        seed,
        residual=residual,
        limit=FULL_GRADIENT_SIZE,
        oversampling=OVERSAMPLING,
        rounding=ROUNDING,
    )


def _decompose(one: _Sum, batches: int) -> WeightGradient:
    found = one.decompose(batches)
    return WeightGradient(*found) if isinstance(found, tuple) else found


def _whole(layer: AdapterLayer, reached: Tensor | None = None) -> _Block:
    return _Block(slice(0, layer.d_out), slice(0, layer.d_in), layer.is_embedding, reached)


def _blocks(layer: AdapterLayer) -> list[_Block]:
    """The whole layer; of a convolution with groups, the rows of each group."""
    groups = layer.layout.groups
    if groups == 1:
        return [_whole(layer)]
    rows, width = layer.d_out // groups, layer.d_in // groups
    return [_Block(slice(i * rows, (i + 1) * rows), slice(0, width)) for i in range(groups)]


def _residual_blocks(layer: AdapterLayer) -> list[list[_Block]]:
    """Per group of a layer its blocks, each with what its ranks reach. Only groups of a convolution have several."""
    heads = layer.groups
    if layer.layout.groups > 1:
        of_groups = layer.A_matrix.chunk(layer.layout.groups, 1)  # (r, d_in / groups) each
        pairs = zip(_blocks(layer), of_groups, strict=True)
        return [[replace(block, reached=_basis_of(rows.T)) for block, rows in pairs]]
    if heads is None:
        return [[_whole(layer, _basis_of(layer.B if layer.is_embedding else layer.A_matrix.T))]]
    found = []
    for head, rows_of_A in enumerate(torch.split(layer.A, list(layer.head_ranks))):  # (r_h, d_in) or (r_h, d_h)
        own, reached = heads.span(head), _basis_of(rows_of_A.T)
        is_rows = heads.kind == "rows"
        rows = own if is_rows else slice(0, layer.d_out)
        columns = slice(0, layer.d_in) if is_rows else own
        found.append([_Block(rows, columns, reached=reached)])
    return found


def _basis_of(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the space that the columns of ``vectors``, (d, r), span: (d, ≤ r) float64."""
    left, values, _ = torch.linalg.svd(vectors.detach().double().cpu(), full_matrices=False)
    reached: Tensor = left[:, values > ROUNDING * values.max()] if len(values) else left
    return reached


class _GradientSum:
    """The sum over batches of one block of G, or of the range finder's projection of it.

    Args:
        block: the block.
        count: the number of singular values, if it has so many.
        seed: seed of Ω.
        limit: up to how many numbers G is summed in full.
    """

    def __init__(self, block: _Block, count: int, seed: int, limit: int = FULL_GRADIENT_SIZE) -> None:
        d_in, d_out = block.d_in, block.d_out
        self.block, self.count = block, min(count, d_in, d_out)
        width = min(self.count + OVERSAMPLING, d_in, d_out)
        self.is_whole = d_in * d_out <= max(limit, width * (d_in + d_out))
        self.total: Tensor | None = None
        self.done = False
        self.omega: Tensor | None = None
        if not self.is_whole:
            generator = torch.Generator().manual_seed(seed % 2**63)
            omega = torch.randn(d_in, width, generator=generator)  # (d_in, k + p)
            self.omega = omega if block.reached is None else block.outside(omega.double(), 1).float()
        self.q: Tensor | None = None  # (d_out, k + p), after the first pass

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor) -> None:
        """Adds one call of the layer. x: (…, d_in), or token ids (…); dy: (…, d_out)."""
        if self.done:
            return
        dy = dy.reshape(-1, dy.shape[-1])[:, self.block.rows].float()  # (tokens, d_out)
        if self.omega is not None and self.q is None:
            self._accumulate(dy.T @ self._project(x, self.omega.to(dy.device)))  # (d_out, k + p)
        else:
            rows = dy if self.q is None else dy @ self.q.to(dy.device)  # (tokens, d_out) or (tokens, k + p)
            self._accumulate(self._outer(rows, x))  # (d_out or k + p, d_in)

    def end_pass(self, mean: Callable[[Tensor], Tensor] | None) -> None:
        if mean is not None and not self.done:
            total = self.total if self.total is not None else self._zeros()
            self.total = mean(total.flatten()).reshape(total.shape)
        if self.omega is not None and self.q is None:
            self.q = None if self.total is None else torch.linalg.qr(self._outside(self.total, 0)).Q
            self.done = self.q is None  # the loss of no batch depends on this layer
            self.total = None
        else:
            self.done = True

    def _zeros(self) -> Tensor:
        """A total of zero. Another process may have a part of this layer's gradient."""
        if self.omega is None:
            return torch.zeros(self.block.d_out, self.block.d_in)
        width = self.omega.shape[1]
        return torch.zeros(self.block.d_out, width) if self.q is None else torch.zeros(width, self.block.d_in)

    def decompose(self, batches: int) -> WeightGradient:
        """The largest part of the mean over batches."""
        block, k = self.block, self.count
        if self.total is None:
            left, right = (torch.eye(width, k, dtype=torch.float64) for width in (block.d_out, block.d_in))
            return WeightGradient(torch.zeros(k, dtype=torch.float64), left, right)
        G = self.total.double().cpu()
        if block.reached is not None:
            G = block.outside(block.outside(G.T, 1).T, 0) if self.q is None else block.outside(G.T, 1).T
        left, values, right = _largest(G, k)
        if block.reached is not None and k:
            values = torch.where(values > ROUNDING * float(self.total.norm()), values, 0)
        if self.q is not None:
            left = self.q.double().cpu() @ left
        return WeightGradient(values / batches, left, right)

    def _outside(self, Y: Tensor, axis: int) -> Tensor:
        return Y if self.block.reached is None else self.block.outside(Y.double().cpu(), axis).to(Y)

    def _project(self, x: Tensor, matrix: Tensor) -> Tensor:
        rows: Tensor = matrix[x.reshape(-1)] if self.block.is_embedding else self._rows(x) @ matrix
        return rows  # (tokens, k + p)

    def _outer(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.block.is_embedding:
            return rows.new_zeros(rows.shape[1], self.block.d_in).index_add_(1, x.reshape(-1), rows.T)
        return rows.T @ self._rows(x)

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])[:, self.block.columns].float()  # (…, all inputs) → (tokens, d_in)

    def _accumulate(self, part: Tensor) -> None:
        self.total = part if self.total is None else self.total + part


def _largest(G: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values of G, (d_out, d_in) float64, and their left and right vectors as columns.

    From the eigenvectors of the smaller of G Gᵀ and Gᵀ G, which takes a third of the time of a singular value
    decomposition. Values below 1e-8 of the largest lose digits; as updates they are worth nothing. Their vectors are
    orthogonal to the others all the same, because they come from a QR decomposition.
    """
    if G.shape[0] < G.shape[1]:
        right, values, left = _largest(G.T, k)
        return left, values, right
    squares, vectors = torch.linalg.eigh(G.T @ G)  # ascending
    right = vectors.flip(1)[:, :k]  # (d_in, k)
    values = squares.flip(0)[:k].clamp_min(0).sqrt()
    left, triangle = torch.linalg.qr(G @ right)  # (d_out, k); the triangle is diagonal up to rounding: ± values
    return left * torch.where(triangle.diagonal() < 0, -1.0, 1.0), values, right


@contextmanager
def _gradient_hooks(layers: AdapterLayers, sums: Mapping[str, Sequence[_Sum]]) -> Iterator[list[Tensor]]:
    """Hooks that pass every layer's x and dy to its sum. Yields A and B of all layers, for the backward pass."""

    def watch(own: Sequence[Any], layer: AdapterLayer) -> Any:
        def after_forward(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                x = inputs[0].detach()

                def add(dy: Tensor) -> None:
                    lora_A = layer.module.lora_A[layer.adapter] if layer.is_convolution else None
                    for own_x, own_dy in [(x, dy)] if lora_A is None else tokens_of(x, dy, lora_A):
                        for one in own:
                            one.add(own_x, own_dy)

                output.register_hook(add)  # type: ignore[no-untyped-call]  # untyped in torch

        return after_forward

    def watch_parameter(own: Sequence[Any]) -> Any:
        def add(gradient: Tensor) -> Tensor:
            for one in own:
                one.add(gradient)
            return gradient.new_zeros(()).expand_as(gradient)  # the gradients of all experts at once may not fit

        return add

    leaves: list[Tensor] = [part for layer in layers.values() for part in layer.stored]  # what the forward pass uses
    parameters = {name: layers[name].module.get_param() for name in sums if layers[name].is_expert}
    leaves += parameters.values()
    wanted = [leaf.requires_grad for leaf in leaves]
    handles = [
        layers[name].module.register_forward_hook(watch(own, layers[name]))
        for name, own in sums.items()
        if name not in parameters
    ]
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        handles += [parameter.register_hook(watch_parameter(sums[name])) for name, parameter in parameters.items()]
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
        for leaf, before in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(before)
