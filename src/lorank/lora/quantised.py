"""Base layers in fewer bits: which can carry ranks that move, and what must not happen to them meanwhile.

    bitsandbytes nf4/fp4 and int8, torchao int8 weight-only, HQQ, GPTQ, quanto     yes
    AWQ, AQLM, EETQ, INC, Transformer Engine      PEFT's layers ignore variants: a gate would change nothing, silently
    torchao with quantised activations            rounding the input stops the gradient to every adapter before it

Three traps, each of which is silent in the libraries themselves:

- bitsandbytes repacks 4-bit weights for the CPU in their first forward in evaluation mode, and a repacked weight passes
  no gradient on: after an evaluation the adapters before it learn nothing. :func:`prevent_repacking` switches that off.
- PEFT's merge into torchao weights asks no variant, so that gates (and DoRA) would be left out.
- PEFT's merge into quanto weights is lost: what is merged is the base model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lorank.errors import AdapterError

# PEFT's classes whose forward hands a LoraVariant its turn, so that a gate is seen.
SUPPORTED = {
    "Linear": "",
    "Embedding": "",
    "Linear4bit": "bitsandbytes 4-bit",
    "Linear8bitLt": "bitsandbytes int8",
    "TorchaoLoraLinear": "torchao int8 weight-only",
    "HqqLoraLinear": "HQQ",
    "GPTQLoraLinear": "GPTQ",
}
# Those that ignore variants silently: a gate on them would change nothing, and every score would be zero.
IGNORE_VARIANTS = {
    "AwqLoraLinear": "AWQ",
    "AqlmLoraLinear": "AQLM",
    "EetqLoraLinear": "EETQ",
    "IncLoraLinear": "Intel Neural Compressor",
    "TeLinear": "Transformer Engine",
}
# bitsandbytes' attribute of a layer that may be repacked.
REPACKS = "support_avx512bf16_for_cpu"
INSTEAD = (
    "Leave the module out with LoraConfig(exclude_modules=…), or load the base model unquantised, or with bitsandbytes "
    "(load_in_4bit, load_in_8bit), torchao's Int8WeightOnlyConfig, HQQ or GPTQ"
)


def check_base(name: str, module: LoraLayer) -> None:
    """Whether the ranks of this layer can move.

    Args:
        name: the module's full name, for the message.
        module: PEFT's LoRA layer.

    Raises:
        AdapterError: its forward ignores gates, or its base layer passes no gradient on.
    """
    kind = type(module).__name__
    if kind not in SUPPORTED:
        known = f" ({IGNORE_VARIANTS[kind]})" if kind in IGNORE_VARIANTS else ""
        raise AdapterError(f"{name} is a {kind}{known}, whose ranks cannot be gated or resized. {INSTEAD}")
    base = module.get_base_layer()
    if kind == "Linear8bitLt" and any(module.use_dora.values()) and base.weight.device.type == "cpu":
        raise AdapterError(
            f"{name}: PEFT's DoRA over bitsandbytes' int8 fails on a CPU, in the second training step. Use LoRA "
            "without DoRA, or a base in nf4"
        )
    if kind == "TorchaoLoraLinear" and _quantises_activations(base.weight):
        raise AdapterError(
            f"{name}: torchao quantises the activations too, and rounding passes no gradient to the adapters before: "
            f"they would learn from the residual stream alone. {INSTEAD}"
        )


def prevent_repacking(model: nn.Module) -> RepackingPrevention:
    """From now on, evaluating the model leaves its quantised weights trainable, and no merge loses an adapter.

    Args:
        model: the PEFT model.

    Returns:
        A handle. Its ``remove()`` lets bitsandbytes repack for inference again.

    Raises:
        AdapterError: weights have been repacked already. Going back would round them.
    """
    for name, module in model.named_modules():
        if is_repacked(module):
            raise AdapterError(
                f"{name}: bitsandbytes has repacked the 4-bit weights for inference on the CPU, which passes no "
                "gradient to the adapters before it. Load the base model again, and evaluate it only after "
                "lorank.attach, or after the Trainer with its RankCallback was made"
            )
        if isinstance(module, LoraLayer):
            guard_merge(module)
    return RepackingPrevention(model)


class RepackingPrevention:
    """The 4-bit layers of a model, which are not repacked until :meth:`remove`."""

    def __init__(self, model: nn.Module) -> None:
        # A C function's answer: 1, not True.
        self._layers = [(m, m.__dict__[REPACKS]) for m in model.modules() if m.__dict__.get(REPACKS)]
        for layer, _ in self._layers:
            layer.__dict__[REPACKS] = False

    def remove(self) -> None:
        """Lets them be repacked."""
        for layer, before in self._layers:
            layer.__dict__[REPACKS] = before
        self._layers = []


def is_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has laid out the module's 4-bit weight for inference on the CPU."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def guard_merge(module: LoraLayer) -> None:
    """Merging this layer raises where PEFT would leave something out silently (torchao, quanto)."""
    if "merge" not in vars(module) and (type(module).__name__ == "TorchaoLoraLinear" or _is_quanto(module)):
        module.merge = partial(_merge, module)  # of the instance; a copy of the model gets a guard of its own


def _merge(module: LoraLayer, *args: Any, **kwargs: Any) -> None:
    if _is_quanto(module):
        raise AdapterError(
            "PEFT's merge into quanto's weights is lost: what it gives is the base model. Save the adapter, and merge "
            "it into the unquantised base"
        )
    for adapter, variant in module.lora_variant.items():
        if hasattr(variant, "refusal"):  # a gate, heads
            raise variant.refusal()
        own = getattr(variant, "replaced", variant)  # what the fused forward stands for
        if own is not None:
            raise AdapterError(
                f"PEFT merges adapter {adapter!r} into torchao's weights without its {type(own).__name__}. Save the "
                "adapter, and merge it into the unquantised base"
            )
    type(module).merge(module, *args, **kwargs)


def _is_quanto(module: LoraLayer) -> bool:
    return type(module.get_base_layer()).__module__.startswith("optimum.quanto")


def _quantises_activations(weight: Any) -> bool:
    return getattr(weight, "act_quant_kwargs", None) is not None or "Activation" in type(weight).__name__
