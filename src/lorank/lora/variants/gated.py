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
from lorank.lora.experts import filler, is_expert, is_filler, update_expert_forward_
from lorank.lora.pool import pool_of
from lorank.lora.quantised import guard_merge
from lorank.lora.rank_layout import RankLayout, layout_of
from lorank.lora.rank_zero import EXTRA_STATE, extra_state, stated_adapters
from lorank.lora.variants import convolution, dora, merging
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.per_head import HeadLora

_PLAIN = RankLayout()


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
        if convolution.is_convolution(module):
            return convolution.forward(module, active_adapter, x, result, self.gate, self.replaced)
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


def update_plain_lora_hooks(module: LoraLayer) -> None:
    """Makes every state dict of the module contain plain LoRA (``save_pretrained``, the Trainer, ``torch.save``).

    A hook is registered if a state dict would contain something else: the module has a gate, heads, a pool or rank 0.
    At rank 0, another hook lets the module load its own state dict. Otherwise the hooks are removed, so that nothing of
    lorank stays on the module. A gate or heads also make ``merge`` raise for quantised layers where PEFT leaves them
    out. The wrapper of a parameter gets its own forward (:mod:`lorank.lora.experts`).
    """
    update_expert_forward_(module)
    transformed = any(isinstance(variant, GatedLora | HeadLora) for variant in module.lora_variant.values())
    if transformed:
        guard_merge(module)
    empty = any(not rank for rank in module.r.values())
    saving = [key for key, hook in module._state_dict_hooks.items() if hook is _plain_lora_hook]
    loading = [
        key
        for key, hook in module._load_state_dict_pre_hooks.items()
        if getattr(hook, "hook", None) is _load_rank_zero_hook
    ]
    if not (transformed or empty or any(pool_of(module, adapter) is not None for adapter in module.r)):
        for key in saving:
            del module._state_dict_hooks[key]
    elif not saving:
        module.register_state_dict_post_hook(_plain_lora_hook)
    if not empty:
        for key in loading:
            del module._load_state_dict_pre_hooks[key]
    elif not loading:
        module.register_load_state_dict_pre_hook(_load_rank_zero_hook)


def _plain_lora_hook(module: LoraLayer, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    empty = [adapter for adapter, rank in module.r.items() if rank == 0]
    for adapter in empty:
        # The module stays in the model and in the optimiser, but PEFT cannot load rank 0 from a file.
        fill = filler(module, adapter) if is_expert(module) else (None, None)
        for key, zeros in zip(_weights(module, adapter), (*fill, None), strict=False):
            if zeros is not None and prefix + key in state_dict:
                state_dict[prefix + key] = zeros
            else:
                state_dict.pop(prefix + key, None)
    if empty:
        state_dict[prefix + EXTRA_STATE] = extra_state(empty)
    for adapter in module.r:
        name_A, name_B = list(_weights(module, adapter))[:2]
        if adapter in empty or prefix + name_B not in state_dict:
            continue
        A, B = state_dict[prefix + name_A], state_dict[prefix + name_B]
        if pool_of(module, adapter) is not None and A.dim() < 2:
            continue  # ZeRO-3: each process has one part of the padded parameter
        state_dict[prefix + name_A], state_dict[prefix + name_B] = to_plain_lora(module, adapter, A, B)


def _load_rank_zero_hook(
    module: LoraLayer, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any, *_: Any
) -> None:
    """Takes the statement of rank 0 from the weights that are loaded, and puts the module's empty tensors in."""
    stated = stated_adapters(state_dict.get(prefix + EXTRA_STATE))
    for adapter in {adapter for adapter, rank in module.r.items() if rank == 0}:
        own = {prefix + key: weight.detach() for key, weight in _weights(module, adapter).items()}
        given = [state_dict[key] for key in own if key in state_dict]
        if is_expert(module) and len(given) == 2 and is_filler(layout_of(module).experts, *given):
            state_dict.update(own)
        if adapter in stated:
            for key, weight in own.items():
                state_dict.setdefault(key, weight)
            state_dict.pop(prefix + EXTRA_STATE, None)


def _weights(module: LoraLayer, adapter: str) -> dict[str, Tensor]:
    """A, B and B's bias, if there is one, by their keys in the module."""
    if adapter in module.lora_embedding_A:
        return {
            f"lora_embedding_A.{adapter}": module.lora_embedding_A[adapter],
            f"lora_embedding_B.{adapter}": module.lora_embedding_B[adapter],
        }
    lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
    bias = {} if lora_B.bias is None else {f"lora_B.{adapter}.bias": lora_B.bias}
    return {f"lora_A.{adapter}.weight": lora_A.weight, f"lora_B.{adapter}.weight": lora_B.weight, **bias}


def to_plain_lora(module: LoraLayer, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of the plain LoRA that is equivalent to a layer's A and B in any form."""
    if pool_of(module, adapter) is not None:
        rank = module.r[adapter]
        A, B = A[:rank], B[:, :rank]
    variant = module.lora_variant.get(adapter)
    if isinstance(variant, GatedLora):
        B = fold_gate(B, variant.gate, layout_of(module))
        variant = variant.replaced
    if isinstance(variant, HeadLora):
        A, B = variant.dense(A, B)
    return A, B


def fold_gate(B: Tensor, gate: Tensor, layout: RankLayout = _PLAIN) -> Tensor:
    """B diag(g), a new tensor. B: (d_out, r), or in the layout of a convolution or of experts; gate: (r,).

    Raises:
        AdapterError: the gate is a gate per sample, (n, r).
    """
    if gate.dim() != 1:
        raise AdapterError(f"a gate per sample, shape {tuple(gate.shape)}, cannot be folded into the weights")
    gate = gate.detach().to(device=B.device, dtype=B.dtype)
    return B.detach() * layout.repeated(gate, B)
