"""The gated forward in plain autograd: the reference for all faster kernels.

    y = W x + s · B (g ⊙ (A x))

PEFT's layers call a ``LoraVariant`` for their forward pass. This variant multiplies by the gate. A layer has it only
while a gate is set; without a gate, PEFT's own forward runs. Every state dict contains B diag(g), a plain LoRA.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor

from lorank.errors import AdapterError
from lorank.lora.pool import pool_of
from lorank.lora.quantised import guard_merge
from lorank.lora.variants import dora, merging
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.per_head import HeadLora


def expand_gate(gate: Tensor, z: Tensor) -> Tensor:
    """Expands the gate to the shape, dtype and device of ``z`` (…, r), so that the two can be multiplied.

    Args:
        gate: (r,), or (n, r) with a gate per sample. Then the first axis of ``z`` must count samples, or for models
            that flatten their tokens, samples × tokens (the tokens of a sample one after another).

    Raises:
        AdapterError: the first axis of ``z`` does not fit a gate per sample.
    """
    gate = gate.to(device=z.device, dtype=z.dtype)
    gate = F.pad(gate, (0, z.shape[-1] - gate.shape[-1]))  # with a pool, z also has the dead ranks
    if gate.dim() == 1:
        return gate  # (r,)
    samples = gate.shape[0]
    if z.shape[0] != samples:
        if z.dim() != 2 or z.shape[0] % samples:
            raise AdapterError(
                f"gates for {samples} samples do not fit an input of shape {tuple(z.shape)}: the first axis must count "
                "samples, or samples × tokens"
            )
        gate = gate.repeat_interleave(z.shape[0] // samples, dim=0)  # (samples · tokens, r)
    return gate.reshape(gate.shape[0], *[1] * (z.dim() - 2), gate.shape[1])  # (n, 1, …, r)


class GatedLora(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """The gated forward of one layer.

    Args:
        gate: (r,) for all samples, or (n, r) with a gate per sample. A leaf that requires a gradient receives it.
        replaced: the variant that the layer had before (PEFT's DoRA, heads, the fused forward), to which the gate is
            applied; or None.
    """

    training_part: ClassVar[str] = "gates"
    """What the layer has only while it is trained. A merge that does not call the variant would leave it out."""

    def __init__(self, gate: Tensor, replaced: LoraVariant | None = None) -> None:
        self.gate = gate
        self.replaced = replaced

    # PEFT declares a static method, but calls it on the instance, which holds the gate.
    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Computes the layer's output, (n, …, d_out).

        Args:
            x: (n, …, d_in), or token ids (n, …).
            result: the base layer's output, (n, …, d_out).
        """
        scaling = module.scaling[active_adapter]
        update: Tensor
        if isinstance(self.replaced, HeadLora | FusedLora):
            return self.replaced.gated(module, active_adapter, x, result, self.gate, expand_gate)
        if self.replaced is not None:
            return dora.forward(module, active_adapter, x, result, self.gate, expand_gate)
        if active_adapter in module.lora_embedding_A:
            A = module.lora_embedding_A[active_adapter]  # (r, number of embeddings)
            B = module.lora_embedding_B[active_adapter]  # (d_out, r)
            z = module._embed(x, A.T)  # (n, …, r)
            update = (z * expand_gate(self.gate, z)) @ B.T * scaling  # (n, …, d_out)
            embed_scale = module._get_embed_scale()
            if embed_scale is not None:
                update = update * embed_scale.to(update.dtype)
        else:
            z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # (n, …, r)
            update = module.lora_B[active_adapter](z * expand_gate(self.gate, z)) * scaling  # (n, …, d_out)
        return result + update

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        with self._plain_update(module, active_adapter):
            return merging.merge_safe(module, active_adapter, orig_weight, self._dora)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        with self._plain_update(module, active_adapter):
            merging.merge_unsafe(module, active_adapter, orig_weight, self._dora)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        with self._plain_update(module, active_adapter):
            return merging.unmerge(module, active_adapter, orig_weight, self._dora)

    @property
    def _dora(self) -> LoraVariant | None:
        own = self.replaced.replaced if isinstance(self.replaced, FusedLora) else self.replaced
        return own if dora.is_dora(own) else None

    def _plain_update(self, module: LoraLayer, adapter: str) -> AbstractContextManager[None]:
        if adapter in module.lora_embedding_A:
            A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        return merging.plain_update(module, adapter, *to_plain_lora(module, adapter, A.detach(), B.detach()))


def register_plain_lora_hooks(module: LoraLayer) -> None:
    """Makes every state dict of the module contain plain LoRA (``save_pretrained``, the Trainer, ``torch.save``).

    It also makes ``merge`` raise for quantised layers where PEFT leaves out gates and heads.
    """
    guard_merge(module)
    if _plain_lora_hook not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_plain_lora_hook)


def _plain_lora_hook(module: LoraLayer, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    for adapter, rank in module.r.items():
        is_embedding = adapter in module.lora_embedding_A
        name_A, name_B = f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"
        if is_embedding:
            name_A, name_B = f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"
        if rank == 0:
            # The module stays in the model and in the optimiser, but PEFT cannot load rank 0 from a file.
            for name in (name_A, name_B, f"lora_B.{adapter}.bias"):
                state_dict.pop(prefix + name, None)
            continue
        if prefix + name_B not in state_dict:
            continue
        A, B = state_dict[prefix + name_A], state_dict[prefix + name_B]
        if pool_of(module, adapter) is not None and A.dim() != 2:
            continue  # ZeRO-3: each process has one part of the padded parameter
        state_dict[prefix + name_A], state_dict[prefix + name_B] = to_plain_lora(module, adapter, A, B)


def to_plain_lora(module: LoraLayer, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of the plain LoRA that is equivalent to a layer's A and B in any form."""
    if pool_of(module, adapter) is not None:
        rank = module.r[adapter]
        A, B = A[:rank], B[:, :rank]
    variant = module.lora_variant.get(adapter)
    if isinstance(variant, GatedLora):
        B = fold_gate(B, variant.gate)
        variant = variant.replaced
    if isinstance(variant, HeadLora):
        A, B = variant.dense(A, B)
    return A, B


def fold_gate(B: Tensor, gate: Tensor) -> Tensor:
    """B diag(g), a new tensor. B: (d_out, r), gate: (r,).

    Raises:
        AdapterError: the gate is a gate per sample, (n, r).
    """
    if gate.dim() != 1:
        raise AdapterError(f"a gate per sample, shape {tuple(gate.shape)}, cannot be folded into the weights")
    return B.detach() * gate.detach().to(device=B.device, dtype=B.dtype)
