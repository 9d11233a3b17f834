"""The gated forward, in plain autograd: the reference that every faster form must equal.

    y = W x + s · B (g ⊙ (A x))

PEFT's layers hand a ``LoraVariant`` their turn; this one multiplies by the gate. It is there only while a gate is set:
without one, PEFT's own forward runs untouched. Whoever saves the model meanwhile saves B diag(g): plain LoRA.
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
from lorank.lora.variants import dora
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.per_head import HeadLora


def expand_gate(gate: Tensor, z: Tensor) -> Tensor:
    """The gate in a shape and dtype that multiplies ``z`` (…, r).

    Args:
        gate: (r,), or (n, r) for a gate per sample, where the first axis of ``z`` counts samples (or samples × tokens,
            for models that flatten their tokens, sample-major).
    """
    gate = gate.to(device=z.device, dtype=z.dtype)
    gate = F.pad(gate, (0, z.shape[-1] - gate.shape[-1]))  # in a pool, the places without a rank
    if gate.dim() == 1:
        return gate  # (r,)
    samples = gate.shape[0]
    if z.shape[0] != samples:
        if z.dim() != 2 or z.shape[0] % samples:
            raise AdapterError(
                f"gates for {samples} samples do not fit an input of shape {tuple(z.shape)}: its first axis must count "
                "samples, or samples × tokens"
            )
        gate = gate.repeat_interleave(z.shape[0] // samples, dim=0)  # (samples · tokens, r)
    return gate.reshape(gate.shape[0], *[1] * (z.dim() - 2), gate.shape[1])  # (n, 1, …, r)


class GatedLora(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """One layer's gate.

    Args:
        gate: (r,) for all samples alike, or (n, r) with a gate per sample. A leaf that requires a gradient gets one.
        replaced: the variant that the layer had before (PEFT's DoRA, heads, the fused forward), whose forward is then
            gated; or None.
    """

    def __init__(self, gate: Tensor, replaced: LoraVariant | None = None) -> None:
        self.gate = gate
        self.replaced = replaced

    # PEFT declares a static method, but calls it on the instance, which is where the gate is.
    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """x: (n, …, d_in), or token ids (n, …); result: the base layer's output (n, …, d_out), as is what returns."""
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
    def refusal() -> AdapterError:
        """Why merging cannot be."""
        return AdapterError("the adapter has gates, which merging would not see: call lorank.lora.fold_gates_ first")

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise self.refusal()

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        raise self.refusal()

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise self.refusal()


def show_plain(module: LoraLayer) -> None:
    """From now on the module's state dict shows plain LoRA, whoever asks for it (``save_pretrained``, the Trainer).

    And merging it, which a gate or heads refuse, is refused where PEFT would not ask them.
    """
    guard_merge(module)
    if _plain not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_plain)


def _plain(module: LoraLayer, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    for adapter, rank in module.r.items():
        is_embedding = adapter in module.lora_embedding_A
        name_A, name_B = f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"
        if is_embedding:
            name_A, name_B = f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"
        if rank == 0:
            # It stays in the model (and in the optimiser), but PEFT must not find it in a file.
            for name in (name_A, name_B, f"lora_B.{adapter}.bias"):
                state_dict.pop(prefix + name, None)
            continue
        if prefix + name_B not in state_dict:
            continue
        A, B = state_dict[prefix + name_A], state_dict[prefix + name_B]
        if pool_of(module, adapter) is not None and A.dim() != 2:
            continue  # each process has its part (ZeRO-3), of what is in fixed shape
        state_dict[prefix + name_A], state_dict[prefix + name_B] = plain_form(module, adapter, A, B)


def plain_form(module: LoraLayer, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of the plain LoRA that the layer's own, in whatever form it is, are equal to."""
    if pool_of(module, adapter) is not None:
        rank = module.r[adapter]
        A, B = A[:rank], B[:, :rank]
    variant = module.lora_variant.get(adapter)
    if isinstance(variant, GatedLora):
        B = folded(B, variant.gate)
        variant = variant.replaced
    if isinstance(variant, HeadLora):
        A, B = variant.dense(A, B)
    return A, B


def folded(B: Tensor, gate: Tensor) -> Tensor:
    """B diag(g), a new tensor. B: (d_out, r), gate: (r,).

    Raises:
        AdapterError: a gate per sample.
    """
    if gate.dim() != 1:
        raise AdapterError(f"a gate per sample, shape {tuple(gate.shape)}, cannot be folded into the weights")
    return B.detach() * gate.detach().to(device=B.device, dtype=B.dtype)
