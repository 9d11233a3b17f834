"""The gated forward in plain autograd: the reference for all faster kernels.

    y = W x + s · B (g ⊙ (A x))

PEFT's layers call a ``LoraVariant`` for their forward pass. This variant multiplies by the gate. A layer has it only
while a gate is set; without a gate, PEFT's own forward runs. Every state dict contains B diag(g), a plain LoRA.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor

from lorank.errors import AdapterError
from lorank.lora.pool import pool_of
from lorank.lora.quantised import guard_merge
from lorank.lora.rank_zero import state_in_metadata
from lorank.lora.variants import dora
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

    @staticmethod
    def merge_error() -> AdapterError:
        """The error for merging a layer with a gate."""
        return AdapterError("the adapter has gates, which PEFT's merge ignores: call lorank.lora.fold_gates_ first")

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise self.merge_error()

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        raise self.merge_error()

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise self.merge_error()


def update_plain_lora_hook(module: LoraLayer) -> None:
    """Makes every state dict of the module contain plain LoRA (``save_pretrained``, the Trainer, ``torch.save``).

    The hook is registered if a state dict would contain something else: the module has a gate, heads, a pool or rank 0.
    Otherwise it is removed, so that nothing of lorank stays on the module. A gate or heads also make ``merge`` raise
    for quantised layers where PEFT ignores them.
    """
    present = [key for key, hook in module._state_dict_hooks.items() if hook is _plain_lora_hook]
    transformed = any(isinstance(variant, GatedLora | HeadLora) for variant in module.lora_variant.values())
    if transformed:
        guard_merge(module)
    if transformed or any(pool_of(module, adapter) is not None or not rank for adapter, rank in module.r.items()):
        if not present:
            module.register_state_dict_post_hook(_plain_lora_hook)
    else:
        for key in present:
            del module._state_dict_hooks[key]


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
            state_in_metadata(state_dict, prefix, adapter)
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
