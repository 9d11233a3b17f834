"""Several adapters of one base model as one adapter, exactly: their weighted sum, whose ranks are all of theirs.

    Σ_i w_i s_i B_i A_i  =  s · [ (w_1 s_1 / s) B_1   (w_2 s_2 / s) B_2   … ] · [ A_1 ; A_2 ; … ]

s is the factor of the first adapter that has a LoRA in the module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from lorank.errors import AdapterError
from lorank.lora.export.adapter_file import AdapterFile, Update
from lorank.lora.export.peft_forms import PeftForm, peft_form


def weighted_sum(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> PeftForm:
    """The sum of adapters, each times its weight. Weights are float32 or wider.

    Args:
        adapters: two or more, of the same base model.
        weights: one number for each, not zero.

    Raises:
        AdapterError: an adapter holds more than plain LoRA, whose sum has no meaning; or two do not fit one model.
    """
    updates: dict[str, Update] = {}
    for adapter in adapters:
        check_summable(adapter)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.updates):
        own = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter.updates]
        first = own[0][0].updates[name]
        scaling = first.scaling or 1.0
        for adapter, _ in own[1:]:
            other = adapter.updates[name]
            if (other.A.shape[1:], len(other.B), other.is_embedding) != (
                first.A.shape[1:],
                len(first.B),
                first.is_embedding,
            ):
                raise AdapterError(
                    f"{name} has other sizes in {adapter.folder} than in {own[0][0].folder}: the adapters are of "
                    "different base models"
                )
        parts = [(adapter.updates[name], weight) for adapter, weight in own]
        dtype = torch.float32
        for one, _ in parts:
            dtype = torch.promote_types(dtype, torch.promote_types(one.A.dtype, one.B.dtype))
        A = torch.cat([one.A.to(dtype) for one, _ in parts], 0)  # (Σ r_i, d_in)
        B = torch.cat([(one.B.double() * (weight * one.scaling / scaling)).to(dtype) for one, weight in parts], 1)
        updates[name] = replace(first, A=A, B=B, scaling=scaling)
    config = copy.copy(adapters[0].config)
    config.use_rslora = False
    settings = {**adapters[0].settings, "target_modules": None}  # a module at rank 0 there may have ranks elsewhere
    return peft_form(AdapterFile(adapters[0].folder, config, settings, updates, {}, ()))


def check_summable(adapter: AdapterFile) -> None:
    """Raises AdapterError if an adapter holds what cannot be added to another one's."""
    found = adapter.beside_lora
    if found:
        raise AdapterError(
            f"the adapter in {adapter.folder} also has {' and '.join(found)}, which cannot be added to another "
            "adapter's: only A and B of plain LoRA can be merged"
        )
