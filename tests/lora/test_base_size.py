"""The parameters of the base model are counted once, without adapters, trained copies and packing."""

from __future__ import annotations

import torch
from torch import nn

from lorank.lora import base_parameters
from tests.models import adapted, tiny_bert, tiny_llama


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_an_adapter_is_not_counted() -> None:
    assert base_parameters(adapted(tiny_llama(), use_dora=True)) == count(tiny_llama())


def test_the_trained_copy_of_a_module_is_not_counted() -> None:
    model = adapted(tiny_bert(), modules_to_save=["classifier"], task_type="SEQ_CLS")
    assert base_parameters(model) == count(tiny_bert())


def test_tied_parameters_count_once() -> None:
    untied, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    assert base_parameters(untied) - base_parameters(tied) == untied.lm_head.weight.numel()


def test_parameters_around_the_same_memory_count_once() -> None:
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.data)
    assert base_parameters(model) == count(tiny_llama(tie_word_embeddings=True))


def test_a_packed_layer_counts_as_before_packing() -> None:
    class Packed(nn.Module):
        """Two values of 4 bits in a byte, as bitsandbytes stores them."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 4
            self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
            self.bias = nn.Parameter(torch.zeros(4))

    packed = Packed()
    assert base_parameters(nn.Sequential(packed, packed, nn.Linear(4, 2))) == (6 * 4 + 4) + (4 * 2 + 2)
