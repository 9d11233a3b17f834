"""Quantised base layers: which are supported, and protection against silent errors of other libraries.

    bitsandbytes nf4/fp4 and int8, torchao int8 weight-only, HQQ, GPTQ, quanto     supported
    AWQ, AQLM, EETQ, INC, Transformer Engine      refused: PEFT's layers ignore variants, so a gate has no effect
    torchao with quantised activations            refused: rounding the input blocks the gradient to all adapters below

The libraries make three silent errors:

- bitsandbytes repacks 4-bit weights for the CPU in their first forward in evaluation mode. A repacked weight passes no
  gradient to its input, so after an evaluation the adapters below it learn nothing. :func:`prevent_repacking` turns
  repacking off.
- PEFT's merge into torchao weights ignores variants, so that gates (and DoRA) would be left out.
- PEFT's merge into quanto weights is lost: the result is the base model without the adapter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.variants.convolution import merges_into_something_else

# PEFT's classes whose forward calls a LoraVariant, so that a gate has an effect.
SUPPORTED = {
    "Linear": "",
    "Embedding": "",
    "Conv1d": "",
    "Conv2d": "",
    "Conv3d": "",
    "Linear4bit": "bitsandbytes 4-bit",
    "Linear8bitLt": "bitsandbytes int8",
    "TorchaoLoraLinear": "torchao int8 weight-only",
    "HqqLoraLinear": "HQQ",
    "GPTQLoraLinear": "GPTQ",
}
# PEFT's classes that silently ignore variants: a gate has no effect, and every score would be zero.
IGNORE_VARIANTS = {
    "AwqLoraLinear": "AWQ",
    "AqlmLoraLinear": "AQLM",
    "EetqLoraLinear": "EETQ",
    "IncLoraLinear": "Intel Neural Compressor",
    "TeLinear": "Transformer Engine",
}
# The attribute by which a bitsandbytes layer decides whether to repack.
REPACKING_FLAG = "support_avx512bf16_for_cpu"
QUANTISED_ADVICE = (
    "Load the base model unquantised, or with bitsandbytes (load_in_4bit, load_in_8bit), torchao's "
    "Int8WeightOnlyConfig, HQQ or GPTQ"
)


def check_base(name: str, module: LoraLayer) -> None:
    """Raises AdapterError if the base of this layer does not let its ranks be trained.

    Args:
        name: the module's full name, for the error message.
        module: PEFT's LoRA layer.

    Raises:
        AdapterError: the base layer passes no gradient to its input, or PEFT cannot train DoRA on it.
    """
    kind = type(module).__name__
    base = module.get_base_layer()
    if kind == "Linear8bitLt" and any(module.use_dora.values()) and base.weight.device.type == "cpu":
        raise AdapterError(
            f"{name}: PEFT's DoRA over bitsandbytes' int8 fails on a CPU, in the second training step. Use LoRA "
            "without DoRA, or a base in nf4"
        )
    if kind == "TorchaoLoraLinear" and _quantises_activations(base.weight):
        raise AdapterError(
            f"{name}: torchao quantises the activations too. Rounding them passes no gradient to the adapters below, "
            f"which would learn from the residual stream alone. {QUANTISED_ADVICE}"
        )


def prevent_repacking(model: nn.Module) -> RepackingPrevention:
    """Keeps quantised weights trainable when the model is evaluated, and makes every merge that loses an adapter raise.

    Args:
        model: the PEFT model.

    Returns:
        A handle. Its ``remove()`` lets bitsandbytes repack weights for inference again.

    Raises:
        AdapterError: weights have been repacked already. Undoing this would round them.
    """
    for name, module in model.named_modules():
        if is_repacked(module):
            raise AdapterError(
                f"{name}: bitsandbytes has repacked the 4-bit weights for inference on the CPU, so they pass no "
                "gradient to the adapters below. Load the base model again, and evaluate it only after lorank.attach, "
                "or after the Trainer with its RankCallback was made"
            )
        if isinstance(module, LoraLayer):
            guard_merge(module)
    return RepackingPrevention(model)


class RepackingPrevention:
    """Keeps bitsandbytes from repacking the 4-bit layers of a model, until :meth:`remove`."""

    def __init__(self, model: nn.Module) -> None:
        # The flag is the result of a C function: 1, not True.
        self._layers = [(m, m.__dict__[REPACKING_FLAG]) for m in model.modules() if m.__dict__.get(REPACKING_FLAG)]
        for layer, _ in self._layers:
            layer.__dict__[REPACKING_FLAG] = False

    def remove(self) -> None:
        """Allows repacking again."""
        for layer, original in self._layers:
            layer.__dict__[REPACKING_FLAG] = original
        self._layers = []


def is_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has repacked the module's 4-bit weight for inference on the CPU."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def guard_merge(module: LoraLayer) -> None:
    """Makes ``merge`` of this layer raise where the merged weight would silently compute something else.

    PEFT drops a part of the adapter (torchao, quanto), or the merge is of another convolution than the LoRA's.
    """
    guarded = type(module).__name__ == "TorchaoLoraLinear" or _is_quanto(module) or merges_into_something_else(module)
    if "merge" not in vars(module) and guarded:
        module.merge = partial(_checked_merge, module)  # on the instance; each copy of a model is guarded separately


def _checked_merge(module: LoraLayer, *args: Any, **kwargs: Any) -> None:
    if _is_quanto(module):
        raise AdapterError(
            "PEFT's merge into quanto's weights is lost: the result is the base model without the adapter. Save the "
            "adapter, and merge it into the unquantised base model"
        )
    if (reason := merges_into_something_else(module)) is not None:
        raise AdapterError(
            f"PEFT's merge would change what the model computes: {reason}. Use the adapter without merging it, or "
            "leave this convolution out of target_modules"
        )
    for adapter, variant in module.lora_variant.items():
        part = getattr(variant, "training_part", None)
        if part is not None:
            raise AdapterError(
                f"PEFT merges adapter {adapter!r} into torchao's weights without its {part}. End the run first "
                "(ranks.finish()); or save the adapter, load it from the file, and merge the loaded adapter"
            )
        peft_variant = getattr(variant, "replaced", variant)  # PEFT's variant, which the fused forward replaces
        if peft_variant is not None:
            raise AdapterError(
                f"PEFT merges adapter {adapter!r} into torchao's weights without its {type(peft_variant).__name__}. "
                "Save the adapter, and merge it into the unquantised base model"
            )
    type(module).merge(module, *args, **kwargs)


def _is_quanto(module: LoraLayer) -> bool:
    return type(module.get_base_layer()).__module__.startswith("optimum.quanto")


def _quantises_activations(weight: Any) -> bool:
    return getattr(weight, "act_quant_kwargs", None) is not None or "Activation" in type(weight).__name__
