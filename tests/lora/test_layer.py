import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorank.errors import AdapterError
from lorank.lora import find_layers, fold_gates_
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch


def test_layers_are_found_in_the_models_order_with_names_of_the_base_model() -> None:
    layers = find_layers(adapted(tiny_llama()))
    assert len(layers) == 14
    assert next(iter(layers)) == "model.layers.0.self_attn.q_proj"
    assert layers.total_rank == 14 * 4
    assert layers.parameters == sum(layer.A.numel() + layer.B.numel() for layer in layers.values())


def test_an_adapter_added_to_a_transformers_model_is_found() -> None:
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert find_layers(model).ranks == {
        f"model.layers.{i}.self_attn.{part}_proj": 2 for i in range(2) for part in ("q", "v")
    }


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"target_modules": ["embed_tokens", "v_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        (tiny_bert, {"task_type": "SEQ_CLS"}),
        (tiny_llama, {"use_rslora": True}),
    ],
    ids=["linear", "embedding", "conv1d", "bert", "rslora"],
)
def test_the_gated_forward_is_the_formula(make, lora) -> None:
    """y = W x + s B (g ⊙ A x): a gate equals the same factors folded into B, and a gate of ones changes nothing."""
    model = adapted(make(), **lora).double().eval()
    batch = token_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    layers = find_layers(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        plain = model(**inputs).logits
        for layer in layers.values():
            layer.gate = torch.ones(layer.rank)
        assert torch.equal(model(**inputs).logits, plain)
        for layer in layers.values():
            layer.gate = torch.rand(layer.rank, generator=generator, dtype=torch.float64)
        gated = model(**inputs).logits
        assert not torch.allclose(gated, plain)
        fold_gates_(layers)
        folded = model(**inputs).logits
    assert all(layer.gate is None and not layer.module.lora_variant for layer in layers.values())
    torch.testing.assert_close(gated, folded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=["linear", "embedding"])
def test_a_gate_per_sample_is_each_samples_own_gate(lora) -> None:
    model = adapted(tiny_llama(), **lora).double().eval()
    batch = token_batch(rows=3)
    layers = find_layers(model)
    gates = {
        name: torch.rand(3, layer.rank, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, (name, layer) in enumerate(layers.items())
    }
    with torch.no_grad():
        for name, layer in layers.items():
            layer.gate = gates[name]
        together = model(input_ids=batch["input_ids"]).logits
        for row in range(3):
            for name, layer in layers.items():
                layer.gate = gates[name][row]
            alone = model(input_ids=batch["input_ids"][row : row + 1]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_a_learned_gate() -> None:
    model = adapted(tiny_llama()).double()
    layers = find_layers(model)
    layer = layers["model.layers.0.self_attn.q_proj"]
    layer.gate = nn.Parameter(torch.ones(4, dtype=torch.float64))
    model(**token_batch()).loss.backward()
    assert layer.gate.grad is not None
    assert (layer.gate.grad != 0).all()
    # At g = 1 the gate's gradient is Σ B ⊙ ∂L/∂B over each column: the same product, seen from its other factor.
    torch.testing.assert_close(layer.gate.grad, (layer.B * layer.B.grad).sum(0))


class TestErrors:
    def test_no_adapter(self) -> None:
        with pytest.raises(AdapterError, match=r"no LoRA layer found in LlamaForCausalLM.*get_peft_model"):
            find_layers(tiny_llama())

    def test_wrong_adapter_name(self) -> None:
        with pytest.raises(AdapterError, match="no adapter 'defalt'; the model has: default"):
            find_layers(adapted(tiny_llama()), "defalt")

    def test_merged(self) -> None:
        model = adapted(tiny_llama())
        model.merge_adapter()
        with pytest.raises(AdapterError, match="is merged into the base weights"):
            find_layers(model)

    def test_an_unsupported_variant(self) -> None:
        with pytest.raises(AdapterError, match="ALoraLinearVariant, whose forward lorank does not support"):
            find_layers(adapted(tiny_llama(), alora_invocation_tokens=[5], task_type="CAUSAL_LM"))

    def test_convolutions(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3)

        with pytest.raises(AdapterError, match="conv is a Conv2d"):
            find_layers(get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv"])))

    def test_another_peft_method(self) -> None:
        from peft import IA3Config

        model = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        with pytest.raises(AdapterError, match="no LoRA layer found"):
            find_layers(model)

    def test_a_gate_of_the_wrong_length(self) -> None:
        layer = next(iter(find_layers(adapted(tiny_llama())).values()))
        with pytest.raises(AdapterError, match=r"shape \(4,\) or \(samples, 4\), got \(3,\)"):
            layer.gate = torch.ones(3)

    def test_merging_while_a_gate_is_set(self) -> None:
        model = adapted(tiny_llama())
        next(iter(find_layers(model).values())).gate = torch.zeros(4)
        with pytest.raises(AdapterError, match="fold_gates_"):
            model.merge_and_unload()
