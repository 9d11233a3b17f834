"""Tiny Llamas whose base weights are quantised, as transformers loads them; HQQ and quanto where installed.

Widths are multiples of 64 and 32, bitsandbytes' block sizes.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models import tiny_llama

SHAPE = {"hidden_size": 64, "intermediate_size": 64}


@functools.cache
def base_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lorank-quantised-"))
    tiny_llama(1, **SHAPE).save_pretrained(folder)
    return folder


def load(**settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32, **settings)


def bnb4() -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return load(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def bnb8() -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")  # a line per layer about fp16
    return load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def torchao8() -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return load(quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def torchao8_dynamic() -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return load(quantization_config=TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig()))


def hqq() -> PreTrainedModel:
    """transformers 5.23 cannot load with HQQ, so its layers are put in by hand."""
    quantize = pytest.importorskip("hqq.core.quantize")
    model = load()
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                settings = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
                setattr(parent, name, quantize.HQQLinear(child, settings, compute_dtype=torch.float32, device="cpu"))
    return model


def quanto() -> PreTrainedModel:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return load(quantization_config=QuantoConfig(weights="int8"))


BASES: dict[str, Callable[[], PreTrainedModel]] = {"bnb4": bnb4, "bnb8": bnb8, "torchao8": torchao8, "hqq": hqq}
