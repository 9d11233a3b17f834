"""The fused forward: PEFT's layer calls :class:`FusedLora`, which computes the same output as PEFT, but faster.

The parameters and the saved files are the same, and the outputs agree up to rounding. The plain formula is used where
the fused forward is not supported: a gate per sample, ``lora_bias``, a dropout other than ``nn.Dropout``,
``torch.compile``, DoRA on a quantised base or under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorank.lora.gramian_sums import LayerGramians
from lorank.lora.kernels.dora import fused_dora, row_norms
from lorank.lora.kernels.lora import fused_lora
from lorank.lora.kernels.onednn import FrozenLinear
from lorank.lora.kernels.sparse_dropout import Dropout, DroppedInput
from lorank.lora.variants import dora, merging


class FusedLora(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """The fused forward of one layer.

    Args:
        dropout: the dropout of all layers of the model.
        replaced: PEFT's DoRA, if the layer uses it; else None.
    """

    def __init__(self, dropout: Dropout, replaced: LoraVariant | None = None) -> None:
        self.dropout = dropout
        self.replaced = replaced
        self.gramians: LayerGramians | None = None
        """Where the backward pass adds z and its gradient (:mod:`lorank.lora.gramians`)."""
        self._square: tuple[int, int, Tensor] | None = None

    # PEFT declares a static method, but calls it on the instance.
    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        output = self._fused(module, active_adapter, x, result, None)
        if output is not None:
            return output
        if self.replaced is not None:
            dora_output: Tensor = self.replaced.forward(
                module, active_adapter=active_adapter, x=x, result=result, **kwargs
            )
            return dora_output
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # (n, …, r)
        update: Tensor = module.lora_B[active_adapter](z) * module.scaling[active_adapter]
        return result + update

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
            gate: (r,), or (n, r) with a gate per sample.
        """
        output = self._fused(module, adapter, x, result, gate) if gate.dim() == 1 else None
        if output is not None:
            return output
        if self.replaced is not None:
            return dora.forward(module, adapter, x, result, gate, expand_gate)
        z = module.lora_A[adapter](module.lora_dropout[adapter](x))  # (n, …, r)
        update: Tensor = module.lora_B[adapter](z * expand_gate(gate, z)) * module.scaling[adapter]
        return result + update

    def _fused(self, module: LoraLayer, adapter: str, x: Tensor, result: Tensor, gate: Tensor | None) -> Tensor | None:
        """The layer's output, or None if the plain formula must be used."""
        lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
        dropout = module.lora_dropout[adapter]
        A, B = lora_A.weight, lora_B.weight
        if (
            lora_B.bias is not None
            or torch.compiler.is_compiling()
            or not isinstance(dropout, nn.Dropout | nn.Identity)
        ):
            return None
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        W = fusable_weight(module, x, result)
        use_sparse_dropout = (
            p > 0 and x.device.type == "cpu"
        )  # on other devices the list of positions would force a synchronisation
        if self.replaced is not None:
            magnitude = module.lora_magnitude_vector[adapter].weight  # (d_out,)
            same_dtype = all(operand.dtype == x.dtype for operand in (A, B, magnitude))
            if W is None or not same_dtype or (p > 0 and not use_sparse_dropout):
                return None
        if p == 1:
            return None
        if p > 0 and not use_sparse_dropout:
            x, W = dropout(x), None
        dropped: DroppedInput | None = self.dropout(x, p) if use_sparse_dropout else None
        scaling = module.scaling[adapter]
        overwrite = may_overwrite_output(module)
        record = self.gramians.add if self.gramians is not None and self.gramians.wants(module) else None
        if self.replaced is None:
            return fused_lora(result, x, A, B, gate, scaling, W=W, dropped=dropped, overwrite=overwrite, record=record)
        assert W is not None
        gate = None if gate is None else gate.to(A)
        norm = row_norms(W, self._row_square(W), A, B, scaling, gate)
        bias = module.get_base_layer().bias
        return fused_dora(
            result,
            x,
            A,
            B,
            gate,
            scaling,
            magnitude,
            W,
            bias,
            norm,
            dropped=dropped,
            overwrite=overwrite,
            record=record,
        )

    def _row_square(self, W: Tensor) -> Tensor:
        """Σ w² of every row, (d_out,), cached until W changes."""
        key = (W.data_ptr(), W._version)
        if self._square is None or self._square[:2] != key:
            with torch.no_grad():
                self._square = (*key, torch.linalg.vector_norm(W, dim=1).square())
        return self._square[2]

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return merging.merge_safe(module, active_adapter, orig_weight, self.replaced)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        merging.merge_unsafe(module, active_adapter, orig_weight, self.replaced)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return merging.unmerge(module, active_adapter, orig_weight, self.replaced)


def may_overwrite_output(module: LoraLayer) -> bool:
    """Whether the base layer's output may be overwritten: a plain linear layer's, which no hook has received."""
    base = module.get_base_layer()
    return (
        type(base) in (nn.Linear, FrozenLinear, Conv1D)
        and not base._forward_hooks
        and "forward" not in vars(base)  # on the instance: offloading replaces it
    )


def frozen_weight(module: LoraLayer) -> Tensor | None:
    """W (d_out, d_in), if the base layer computes x Wᵀ + a constant, is frozen and has no hooks; else None."""
    base = module.get_base_layer()
    if not may_overwrite_output(module) or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    W, bias = base.weight, base.bias
    if type(W) is not nn.Parameter or W.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return W.T if isinstance(base, Conv1D) else W


def fusable_weight(module: LoraLayer, x: Tensor, result: Tensor) -> Tensor | None:
    """W (d_out, d_in), if ``result`` is certainly x Wᵀ + a constant, so that it can be fused; else None."""
    W = frozen_weight(module)
    if W is None or len(module.active_adapters) > 1 or not x.dtype == W.dtype == result.dtype:
        return None
    return W
