"""Rank 0 is stated beside the weights, in ways that PEFT reads without a word and PyTorch keeps."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from lorank.lora import LayerPlan, find_layers, resize_
from lorank.lora.rank_zero import (
    EXTRA_STATE,
    extra_state,
    stated_adapters,
    stated_in_targets,
    target_entries,
    target_pattern,
)
from tests.elsewhere import Case, reload
from tests.lora.forms import logits
from tests.models import adapted, tiny_llama, token_batch

Q, K, DOWN = (f"model.layers.0.{end}" for end in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


def with_empty_modules(layers: int = 2) -> PeftModel:
    model = adapted(tiny_llama(layers)).eval()
    resize_(find_layers(model), {Q: LayerPlan(()), DOWN: LayerPlan(()), K: LayerPlan((0, 2), 1)})
    return model


def test_every_copy_and_file_of_a_state_dict_states_rank_0_and_an_adapters_file_holds_nothing(tmp_path: Path) -> None:
    model = with_empty_modules()
    state = nn.ModuleDict({"inner": model}).state_dict()
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    for dictionary in (
        state,
        {**state},
        copy.deepcopy(state),
        torch.load(tmp_path / "state.pt", weights_only=True),
        load_file(tmp_path / "state.safetensors"),
    ):
        stated = {key: stated_adapters(value) for key, value in dictionary.items() if key.endswith(EXTRA_STATE)}
        assert stated == {f"inner.base_model.model.{name}.{EXTRA_STATE}": {"default"} for name in (Q, DOWN)}
    assert not any(Q in key and "lora_" in key for key in state)
    assert not any(EXTRA_STATE in key for key in get_peft_model_state_dict(model))
    assert get_model_state_dict(model).keys() == model.state_dict().keys()  # PyTorch's distributed checkpoints


def test_another_extra_state_states_nothing() -> None:
    for value in (None, {"rank 0": ["default"]}, torch.zeros(0), torch.tensor([300]), extra_state(["default"])[1:]):
        assert not stated_adapters(value)
    assert stated_adapters(extra_state(["a", "b"]).to(torch.bfloat16)) == {"a", "b"}


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=["linear", "embedding"])
def test_a_model_loads_its_own_state_dict_strictly_without_a_run(lora: dict[str, Any]) -> None:
    model = adapted(tiny_llama(), **lora)
    layers = find_layers(model)
    first = next(iter(layers))
    resize_(layers, {first: LayerPlan(())})
    before = model.state_dict()
    model.load_state_dict(before)
    assert layers[first].rank == 0
    with pytest.raises(RuntimeError, match=rf"Missing key.*{re.escape(first)}"):  # nothing states that it has rank 0
        model.load_state_dict({key: value for key, value in before.items() if EXTRA_STATE not in key})
    resize_(layers, {first: LayerPlan((), 2)})
    assert not any(module._load_state_dict_pre_hooks or module._state_dict_hooks for module in model.modules())


def test_a_configuration_states_rank_0_in_both_forms_of_target_modules() -> None:
    names = ["a.b", "b", "c"]
    assert stated_in_targets({"c", *target_entries(["a.b"])}, names) == {"a.b"}
    assert stated_in_targets(target_pattern(["c"], ["a.b", "b"]), names) == {"a.b", "b"}
    for nothing in (None, "all-linear", ["c"], "a.b|b|c"):
        assert not stated_in_targets(nothing, names)


@pytest.mark.parametrize("layers", [2, 6], ids=["few modules", "so many that PEFT shortens their names"])
def test_peft_reads_combines_and_swaps_the_configuration_without_a_warning(tmp_path: Path, layers: int) -> None:
    model = with_empty_modules(layers)
    expected = logits(model)
    model.save_pretrained(tmp_path / "empty")
    full = adapted(tiny_llama(layers)).eval()
    full.save_pretrained(tmp_path / "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # transformers, of its own
        loaded = PeftModel.from_pretrained(tiny_llama(layers), tmp_path / "empty").eval()
        assert torch.equal(logits(loaded), expected)
        hotswap_adapter(loaded, str(tmp_path / "empty"), "default")
        assert torch.equal(logits(loaded), expected)
        loaded.load_adapter(tmp_path / "full", "full")
        loaded.add_weighted_adapter(["default", "full"], [0.0, 1.0], "both", combination_type="cat")
        loaded.set_adapter("both")
        assert torch.allclose(logits(loaded), logits(full), atol=1e-6)  # also where the first adapter has rank 0


def test_a_new_process_without_lorank_reads_the_folder(tmp_path: Path) -> None:
    model = with_empty_modules()
    tiny_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(token_batch(), tmp_path / "batch.pt")
    case = Case(*(str(tmp_path / name) for name in ("base", "adapter", "batch.pt", "out.pt")))
    (found,) = reload([case], tmp_path)
    with torch.no_grad():
        expected = model(**token_batch()).logits
    assert torch.allclose(found["logits"], expected, atol=1e-6)
    assert torch.allclose(found["merged"], expected, atol=1e-5)


def test_modules_that_get_ranks_again_are_named_again(tmp_path: Path) -> None:
    """Also for layers that were found while the modules had rank 0, and do not know the user's ``target_modules``."""
    model = with_empty_modules()
    layers = find_layers(model)
    resize_(layers, {Q: LayerPlan((), 2), DOWN: LayerPlan((), 1)})
    with torch.no_grad():
        layers[Q].B.fill_(0.1)
        layers[DOWN].B.fill_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert find_layers(loaded).ranks == layers.ranks
    assert torch.equal(logits(loaded), logits(model))
