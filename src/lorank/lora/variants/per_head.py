"""The per-head form of a layer: PEFT's layer calls :class:`HeadLora`, which knows the rows or columns of each head.

In this form, A or B holds only the blocks of the heads (:mod:`lorank.lora.kernels.per_head`). The form exists during
training only. Every state dict contains the equivalent plain LoRA, with zeros outside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from lorank.lora.kernels.per_head import HeadGroups, compact_A, compact_B, dense_A, dense_B, per_head
from lorank.lora.kernels.sparse_dropout import Dropout
from lorank.lora.variants import merging
from lorank.lora.variants.fused import fusable_weight, may_overwrite_output


class HeadLora(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """The per-head forward of one layer.

    Args:
        groups: the rows or columns that the heads own.
        ranks: r_h of every head, (H,); the ranks of A and B are in head order.
        dropout: the dropout of all layers of the model, if they are fused (:func:`lorank.lora.fuse_`). None: PyTorch's
            dropout is used, and the frozen base layer (linear map W) keeps its autograd graph.
    """

    training_part: ClassVar[str] = "heads"
    """What the layer has only while it is trained. A merge that does not call the variant would leave it out."""

    def __init__(self, groups: HeadGroups, ranks: Sequence[int], dropout: Dropout | None = None) -> None:
        self.groups = groups
        self.ranks = tuple(ranks)
        self.dropout = dropout

    # PEFT declares a static method, but calls it on the instance, which holds the heads.
    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        return self._update(module, active_adapter, x, result, None)

    def gated(
        self,
        module: LoraLayer,
        adapter: str,
        x: Tensor,
        result: Tensor,
        gate: Tensor,
        expand_gate: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Computes the layer's output with a gate.

        Args:
            x: (n, …, d_in).
            result: the base layer's output, (n, …, d_out).
            gate: (R,), or (n, R) with a gate per sample.
        """
        if gate.dim() == 1:
            return self._update(module, adapter, x, result, gate)
        A, B = self.dense(module.lora_A[adapter].weight, module.lora_B[adapter].weight)
        z = F.linear(module.lora_dropout[adapter](x), A)  # (n, …, R)
        update: Tensor = F.linear(z * expand_gate(gate, z), B) * module.scaling[adapter]
        return result + update

    def _update(self, module: LoraLayer, adapter: str, x: Tensor, result: Tensor, gate: Tensor | None) -> Tensor:
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        dropout, dropped, W = module.lora_dropout[adapter], None, None
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if (
            self.dropout is not None
            and isinstance(dropout, nn.Dropout | nn.Identity)
            and x.device.type == "cpu"
            and p < 1
        ):
            W = fusable_weight(module, x, result)
            dropped = self.dropout(x, p) if p > 0 else None
        else:
            x = dropout(x)
        return per_head(
            result,
            x,
            A,
            B,
            gate,
            module.scaling[adapter],
            self.groups,
            self.ranks,
            W=W,
            dropped=dropped,
            overwrite=may_overwrite_output(module),
        )

    def dense(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, d_in) and B (d_out, R) of the plain LoRA that is equivalent to these heads."""
        return dense_A(A, self.groups, self.ranks), dense_B(B, self.groups, self.ranks)

    def compact(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`dense`."""
        return compact_A(A, self.groups, self.ranks), compact_B(B, self.groups, self.ranks)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        with self._plain_update(module, active_adapter):
            return merging.merge_safe(module, active_adapter, orig_weight, None)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        with self._plain_update(module, active_adapter):
            merging.merge_unsafe(module, active_adapter, orig_weight, None)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        with self._plain_update(module, active_adapter):
            return merging.unmerge(module, active_adapter, orig_weight, None)

    def _plain_update(self, module: LoraLayer, adapter: str) -> AbstractContextManager[None]:
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        return merging.plain_update(module, adapter, *self.dense(A.detach(), B.detach()))


def head_ranks_of(A: Tensor, B: Tensor, groups: HeadGroups, preferred: Sequence[int]) -> tuple[int, ...] | None:
    """Derives r_h of every head, (H,), from the zeros in A and B of a plain LoRA; None if the LoRA is not per head.

    A rank without any non-zero element (a new rank, B = 0) could belong to any head. It is assigned to the same head as
    the rank before it.

    Args:
        A: (R, d_in), B: (d_out, R).
        groups: the heads.
        preferred: head ranks that are returned if A and B fit them. This decides about ranks that are zero.
    """
    if sum(preferred) == len(A):
        blocks_only = HeadLora(groups, preferred)
        if all(map(torch.equal, blocks_only.dense(*blocks_only.compact(A, B)), (A, B))):
            return tuple(preferred)
    owned = B.T if groups.kind == "rows" else A  # (R, H · d_h)
    used = (owned.reshape(-1, groups.count, groups.size) != 0).any(dim=2)  # (R, H)
    if (used.sum(dim=1) > 1).any():
        return None
    ranks = [0] * groups.count
    head = 0
    for rank, known in enumerate(used.any(dim=1).tolist()):
        if known:
            found = int(used[rank].int().argmax())
            if found < head:
                return None  # not in head order
            head = found
        ranks[head] += 1
    return tuple(ranks)
