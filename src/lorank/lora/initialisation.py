"""PEFT's initialisations of an adapter (``init_lora_weights``), and what they mean once ranks have moved.

When PEFT loads a file, it first makes the adapter as the file's ``init_lora_weights`` says, at the ranks in the file,
and then overwrites A and B. There are two kinds.

**The base stays as it is**: True, False, ``gaussian``, ``orthogonal``, ``eva``. The file loads exactly. But
``orthogonal`` refuses odd ranks, and servers refuse some names, so after ranks have moved the configuration says True.

**The base is changed at the start**: ``pissa``, ``pissa_niter_N``, ``olora``, ``corda``, ``loftq``, ``lora_ga``. They
take s·B₀A₀ (or a quantisation error) out of W. PEFT makes this change again when it loads the file, from the ranks in
the file: once ranks have moved, from others than at the start, so that the outputs differ. Changes of rank are refused.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from lorank.errors import AdapterError
from lorank.lora.layer import AdapterLayers

INIT_FIELDS = ("init_lora_weights", "eva_config")
"""The fields of a ``LoraConfig`` that :func:`set_plain_init_` changes."""
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHER_INITS = "init_lora_weights=True, 'gaussian', 'orthogonal' or 'eva'"


def changes_base(init: Any) -> bool:
    """Whether PEFT changes the base weights for this value of ``init_lora_weights``."""
    return isinstance(init, str) and init.lower().startswith(_CHANGING_BASE)


def check_base_unchanged(layers: AdapterLayers, what: str = "a change of its ranks") -> None:
    """Checks that ranks of the adapter may change: that its initialisation left the base weights alone.

    Args:
        layers: all LoRA layers of the adapter.
        what: what would change the ranks, for the message.

    Raises:
        AdapterError: the adapter was initialised by a method that changes the base weights.
    """
    init = layers.config.init_lora_weights
    if not changes_base(init):
        return
    if str(init).lower().startswith("loftq"):
        instead = "save the changed base as a base model of its own, and the adapter as a plain LoRA of that base"
    else:
        instead = (
            "convert it to a plain LoRA of the unchanged base, save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=…), and load it with PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)"
        )
    raise AdapterError(
        f"the adapter was made with init_lora_weights={init!r}, which changed the base weights. PEFT makes this change "
        f"again when it loads the adapter's file, from the ranks in the file, so {what} would give other outputs "
        f"there. Make the adapter with {_OTHER_INITS}; or {instead} (docs/compatibility.md shows how)"
    )


def check_file_can_shrink(init: Any) -> None:
    """Checks, from the settings in an adapter's file, that a smaller file can be made of it.

    Args:
        init: ``init_lora_weights`` in the file.

    Raises:
        AdapterError: the adapter was initialised by a method that changes the base weights.
    """
    if changes_base(init):
        raise AdapterError(
            f"the adapter was made with init_lora_weights={init!r}: PEFT changes the base weights when it loads the "
            "file, from the ranks in the file, so fewer ranks would give other outputs. Save the changed base as a "
            "base model of its own, and the adapter as a plain LoRA of that base (docs/compatibility.md shows how); "
            "then prune that adapter"
        )


def check_file_can_be_loaded(init: Any) -> None:
    """Checks that PEFT loads a file of this initialisation with the outputs that it was trained to.

    Args:
        init: ``init_lora_weights`` in the file.

    Raises:
        AdapterError: PEFT cannot repeat the change of the base weights, because it was computed from data.
    """
    if isinstance(init, str) and init.lower().startswith(("corda", "lora_ga")):
        raise AdapterError(
            f"the adapter was made with init_lora_weights={init!r}, which changed the base weights by statistics of "
            "data, and PEFT cannot repeat this when it loads the file. If the base model that you give is the changed "
            'one, set "init_lora_weights": true in adapter_config.json; otherwise convert the adapter where it was '
            "trained (docs/compatibility.md shows how)"
        )


def set_plain_init_(config: LoraConfig) -> None:
    """Sets ``init_lora_weights`` to a value with which PEFT loads any ranks. A and B come from the file in any case.

    ``gaussian`` stays, because new ranks are drawn as it says and PEFT loads it at any rank.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() != "gaussian" and not changes_base(init):
        config.init_lora_weights, config.eva_config = True, None
