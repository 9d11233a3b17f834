"""Which quantised bases are taken, which are refused and why, and that nothing is lost silently."""

from __future__ import annotations

import copy

import pytest
import torch

import lorank
from lorank.errors import AdapterError
from lorank.lora import find_layers, prevent_repacking
from lorank.lora.quantised import IGNORE_VARIANTS, SUPPORTED, is_repacked
from tests.models import adapted, tiny_llama, token_batch
from tests.quantised import bnb4, quanto, torchao8, torchao8_dynamic

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def evaluate(model: torch.nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(**token_batch())
    model.train()


@pytest.mark.parametrize("kind", IGNORE_VARIANTS)
def test_a_layer_that_would_ignore_gates_is_refused(kind: str) -> None:
    model = adapted(tiny_llama(1), target_modules=["q_proj"])
    module = next(iter(find_layers(model).values())).module
    module.__class__ = type(kind, (type(module),), {})
    with pytest.raises(AdapterError, match=rf"q_proj is a {kind} \({IGNORE_VARIANTS[kind]}\).*load_in_4bit"):
        find_layers(model)


def test_supported_layers_call_variants_and_refused_layers_do_not() -> None:
    """From PEFT's own source: what a layer's forward does with ``lora_variant``."""
    from pathlib import Path

    import peft.tuners.lora

    folder = Path(peft.tuners.lora.__file__).parent
    sources = {path: path.read_text() for path in folder.glob("*.py")}
    for kind in (*SUPPORTED, *IGNORE_VARIANTS):
        (source,) = (text for text in sources.values() if f"class {kind}(" in text)
        body = source.split(f"class {kind}(")[1].split("\nclass ")[0]
        # torchao's inherits its forward from Linear
        if kind in ("Conv1d", "Conv2d", "Conv3d"):  # their forward is that of a common base class
            assert body.startswith("_ConvNd)"), kind
            body = source.split("class _ConvNd(")[1].split("\nclass ")[0]
        honours = "self.lora_variant[active_adapter].forward" in body or "class TorchaoLoraLinear(Linear)" in source
        assert honours == (kind in SUPPORTED), kind


def test_quantised_activations_block_the_gradient_and_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"Rounding them passes no gradient.*Int8WeightOnlyConfig"):
        find_layers(adapted(torchao8_dynamic()))


def test_evaluation_during_training_does_not_repack_4bit_weights() -> None:
    model = adapted(bnb4())
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = 1  # on every CPU: repacking itself needs no instruction
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ranks = lorank.attach(model, optimizer, lorank.AdaLoRA(t_init=0, t_final=0, delta_t=1), total_steps=4)
    evaluate(model)
    assert not any(is_repacked(module) for module in model.modules())
    model(**token_batch()).loss.backward()
    assert all(layer.B.grad.any() for layer in ranks.layers.values())
    ranks.detach()
    assert all(module.support_avx512bf16_for_cpu for module in model.modules() if is_four_bit(module))


def is_four_bit(module: torch.nn.Module) -> bool:
    return hasattr(module, "support_avx512bf16_for_cpu")


def test_repacked_4bit_weights_are_refused() -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = adapted(bnb4())
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(AdapterError, match=r"repacked the 4-bit weights.*only after lorank\.attach"):
        prevent_repacking(model)


class TestMerging:
    def test_torchao_with_a_gate(self) -> None:
        model = adapted(torchao8())
        layer = next(iter(find_layers(model).values()))
        layer.gate = torch.zeros(4)
        twin = copy.deepcopy(model)
        for one in (model, twin):
            with pytest.raises(AdapterError, match=r"without its gates. End the run first \(ranks.finish"):
                one.merge_and_unload()
        layer.gate = None
        model.merge_and_unload()
        assert next(iter(find_layers(twin).values())).gate is not None

    def test_torchao_with_dora(self) -> None:
        model = adapted(torchao8(), use_dora=True)
        prevent_repacking(model)
        with pytest.raises(AdapterError, match="without its DoraLinearVariant"):
            model.merge_and_unload()

    def test_quanto(self) -> None:
        model = adapted(quanto())
        find_layers(model)
        prevent_repacking(model)
        with pytest.raises(AdapterError, match="merge it into the unquantised base"):
            model.merge_and_unload()
