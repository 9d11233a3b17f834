"""The kinds of modules whose ranks can change: linear maps, embeddings and convolutions. Others are refused.

Parameters (``target_parameters``) are supported too (:mod:`lorank.lora.experts`). PEFT also adapts
``nn.MultiheadAttention``, whose layer does not call a ``LoraVariant``, so that its ranks cannot be gated. The message
of a refusal has a way round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorank.errors import AdapterError
from lorank.lora.experts import is_expert
from lorank.lora.quantised import IGNORE_VARIANTS, QUANTISED_ADVICE, SUPPORTED


def check_kinds(base: nn.Module, adapted: Mapping[str, LoraLayer], config: LoraConfig) -> None:
    """Raises AdapterError if an adapted module is of a kind whose ranks cannot change.

    Args:
        base: the model that PEFT has wrapped.
        adapted: PEFT's layers, by their names in ``base``.
        config: the adapter's configuration.

    Raises:
        AdapterError: the message names all such modules, and a LoraConfig that avoids them.
    """
    refused = {name: reason for name, module in adapted.items() if (reason := _reason(base, name, module))}
    if not refused:
        return
    (first, reason), others = next(iter(refused.items())), list(refused)[1:]
    more = ""
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        more = f" (and {len(others)} more of the {len(adapted)} adapted modules: {shown})"
    if all(type(adapted[name]).__name__ in IGNORE_VARIANTS for name in refused):
        raise AdapterError(f"{first} {reason}{more}. {QUANTISED_ADVICE}")
    raise AdapterError(f"{first} {reason}{more}. {_other_targets(base, adapted, refused, config)}")


def _reason(base: nn.Module, name: str, module: LoraLayer) -> str | None:
    """Why the ranks of a module cannot change; None if they can."""
    kind = type(module).__name__
    parent = base.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and kind in SUPPORTED:
        return "is part of an nn.MultiheadAttention, which reads its weight without calling it: its LoRA has no effect"
    if kind in SUPPORTED or is_expert(module):
        return None
    if kind == "MultiheadAttention":
        return (
            "is an nn.MultiheadAttention. PEFT gives its two projections one rank, and merges them in every forward "
            "pass (the output projection twice), so their ranks cannot be gated or move on their own"
        )
    library = f" ({IGNORE_VARIANTS[kind]})" if kind in IGNORE_VARIANTS else ""
    return f"is a {kind}{library}, whose ranks cannot be gated or resized"


def _other_targets(
    base: nn.Module, adapted: Mapping[str, LoraLayer], refused: Collection[str], config: LoraConfig
) -> str:
    """The advice: a LoraConfig for the same base model that lorank supports."""
    wanted = [name for name, module in adapted.items() if name not in refused and not is_expert(module)]
    if not wanted:
        wanted = _others(base, refused, (nn.Linear, nn.Embedding, Conv1D))
    if not wanted:
        wanted = _others(base, refused, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if not wanted:
        return "The model has no other linear layer, embedding or convolution, so lorank cannot be used with it"
    kept = f", target_parameters={sorted(config.target_parameters)!r}" if config.target_parameters else ""
    return (
        "Adapt linear layers, embeddings and convolutions only: "
        f"LoraConfig(target_modules={_targets(base, wanted)!r}{kept})"
    )


def _others(base: nn.Module, refused: Iterable[str], kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Modules of some kinds outside the refused ones, without the model's input and output embeddings."""
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings.append(getattr(base, getter)())
        except (AttributeError, NotImplementedError):
            continue
    outside = tuple(f"{name}." for name in refused)
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, kinds)
        and not f"{name}.".startswith(outside)
        and not isinstance(base.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        and all(module is not embedding for embedding in embeddings)
    ]


def _targets(base: nn.Module, wanted: Collection[str]) -> list[str]:
    """Names for ``target_modules`` that select exactly the wanted modules: their last parts, where these are enough."""
    chosen = set(wanted)
    # PEFT's own modules inside a layer are not in the base model that the user will adapt.
    names = [name for name, _ in base.named_modules() if ".base_layer" not in name and ".lora_" not in name]
    targets: dict[str, None] = {}  # in order
    for name in wanted:
        last = name.rpartition(".")[2]
        alike = [other for other in names if other == last or other.endswith(f".{last}")]
        targets[last if not last.isdigit() and chosen.issuperset(alike) else name] = None
    return list(targets)
