"""A layer in per-head form: PEFT hands its turn to :class:`HeadLora`, which knows what the heads own.

While a layer is in this form its A or B holds the blocks alone (:mod:`lorank.lora.kernels.per_head`). It exists during
training
only: every state dict shows the one plain LoRA that the heads are equal to, with zeros outside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from lorank.errors import AdapterError
from lorank.lora.kernels.per_head import HeadGroups, compact_A, compact_B, dense_A, dense_B, per_head
from lorank.lora.kernels.sparse_dropout import Dropout
from lorank.lora.variants.fused import frozen_weight, owns_output


class HeadLora(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """One layer's heads.

    Args:
        groups: what the heads own.
        ranks: r_h of every head, (H,); the ranks of A and B are in head order.
        dropout: draws the dropout of all layers of the model, where they are fused (:func:`lorank.lora.fuse_`); None:
            PyTorch's dropout, and the frozen map's graph is left alone.
    """

    def __init__(self, groups: HeadGroups, ranks: Sequence[int], dropout: Dropout | None = None) -> None:
        self.groups = groups
        self.ranks = tuple(ranks)
        self.dropout = dropout

    # PEFT declares a static method, but calls it on the instance, which is where the heads are.
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
        """The layer's output. x: (n, …, d_in), result: (n, …, d_out), gate: (R,), or (n, R) with a gate per sample."""
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
            W = frozen_weight(module, x, result)
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
            into=owns_output(module),
        )

    def dense(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, d_in) and B (d_out, R) of the plain LoRA that these heads are equal to."""
        return dense_A(A, self.groups, self.ranks), dense_B(B, self.groups, self.ranks)

    def compact(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`dense`."""
        return compact_A(A, self.groups, self.ranks), compact_B(B, self.groups, self.ranks)

    @staticmethod
    def refusal() -> AdapterError:
        """Why merging cannot be."""
        return AdapterError(
            "the adapter is in per-head form, which merging cannot see: end the run first (ranks.finish()), or save "
            "the adapter and merge what is loaded from the file"
        )

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise self.refusal()

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        raise self.refusal()

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise self.refusal()


def head_ranks_of(A: Tensor, B: Tensor, groups: HeadGroups, preferred: Sequence[int]) -> tuple[int, ...] | None:
    """Whose the ranks of a plain LoRA are, seen from where its matrices are zero; None: they are not per head.

    A rank that is zero altogether (new, B = 0) could be anyone's: it goes to the head before it.

    Args:
        A: (R, d_in), B: (d_out, R).
        preferred: head ranks to take where they fit, which settles ranks that are zero.
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
