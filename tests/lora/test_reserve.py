"""Reserved ranks change neither outputs nor files, and layers that cannot have them are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorank
from lorank.lora import LayerPlan, find_layers, resize_
from tests.lora.forms import ROOM, plain_and_reserved
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch


def test_reserving_ranks_changes_neither_outputs_nor_saved_files(tmp_path: Path) -> None:
    plain, roomy = plain_and_reserved()
    batch = token_batch()
    assert torch.allclose(plain(**batch).logits, roomy(**batch).logits, atol=1e-14, rtol=0)
    layers = find_layers(roomy)
    assert layers.ranks == find_layers(plain).ranks
    for layer in layers.values():
        assert [tuple(weight.shape) for weight in layer.stored] == [(ROOM, layer.d_in), (layer.d_out, ROOM)]
    plain.save_pretrained(str(tmp_path / "plain"))
    roomy.save_pretrained(str(tmp_path / "roomy"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("roomy", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_layers_that_cannot_reserve_ranks_are_refused() -> None:
    with pytest.raises(lorank.LorankError, match="has 4 ranks; give at least 4"):
        lorank.reserve_(adapted(tiny_llama()), 3)
    with pytest.raises(lorank.LorankError, match="uses DoRA"):
        lorank.reserve_(adapted(tiny_llama(), use_dora=True), 8)
    with pytest.raises(lorank.LorankError, match="is an embedding"):
        lorank.reserve_(adapted(tiny_gpt2(), target_modules=["wte"]), 8)
    model = lorank.reserve_(adapted(tiny_llama()), 8)
    with pytest.raises(lorank.LorankError, match="8 reserved ranks already"):
        lorank.reserve_(model, 8)
    layers = find_layers(model)
    name = next(iter(layers))
    with pytest.raises(lorank.LorankError, match="at most the reserved 8 ranks"):
        resize_(layers, {name: LayerPlan((0, 1, 2, 3), 5)})
