"""The LoRA of convolutions: gates, DoRA, rank 0 and merging, against PEFT's layer and against plain sums."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lorank.errors import AdapterError
from lorank.lora import AdapterLayer, LayerPlan, find_layers, resize_
from lorank.lora.quantised import guard_merge
from lorank.lora.variants.gated import fold_gate

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")

CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"padding": 1}),
    "2d": (nn.Conv2d, {"stride": 2, "padding": 1}),
    "3d": (nn.Conv3d, {}),
    "without bias": (nn.Conv2d, {"padding": "same", "bias": False}),
    "groups": (nn.Conv2d, {"groups": 2, "padding": 1}),
    "depthwise": (nn.Conv1d, {"groups": 4}),
    "dilation": (nn.Conv2d, {"padding": "same", "dilation": 2}),
    "reflected": (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}),
}
MERGED = [name for name, (_, settings) in CASES.items() if not {"groups", "dilation", "padding_mode"} & set(settings)]


def make(case: str, rank: int = 4, seed: int = 0, **lora: Any) -> tuple[PeftModel, AdapterLayer, Tensor]:
    """A model of one convolution in float64, its layer, and an input."""
    kind, settings = CASES[case]
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(kind(4, 8, 3, **settings)).double(),
        LoraConfig(r=rank, lora_alpha=6, target_modules=["0"], **lora),
    )
    (layer,) = find_layers(model).values()
    layer.B.data.normal_()
    size = {nn.Conv1d: (7,), nn.Conv2d: (7, 6), nn.Conv3d: (5, 4, 3)}[kind]  # type: ignore[index]
    return model, layer, torch.randn(2, 4, *size, dtype=torch.float64)


def rank_alone(layer: AdapterLayer, x: Tensor, rank: int) -> Tensor:
    """The update of one rank: its kernels of A, group by group, times its column of B."""
    lora_A, lora_B = layer.module.lora_A["default"], layer.module.lora_B["default"]
    z = lora_A(x)  # (n, G · r, …)
    groups = lora_B.groups
    rows, own = layer.d_out // groups, torch.zeros_like(layer.module.get_base_layer()(x))
    for group in range(groups):
        some = slice(group * rows, (group + 1) * rows)
        channel = z[:, group * layer.rank + rank].unsqueeze(1)  # (n, 1, …)
        own[:, some] = channel * lora_B.weight[some, rank].reshape(1, rows, *[1] * (x.dim() - 2))
    return own * layer.scaling


@pytest.mark.parametrize("case", CASES)
class TestGates:
    def test_a_gate_multiplies_its_rank_and_one_changes_nothing(self, case: str) -> None:
        model, layer, x = make(case)
        plain = model(x)
        gate = torch.linspace(-1, 2, layer.rank, dtype=torch.float64)
        layer.gate = gate
        base = layer.module.get_base_layer()(x)
        expected = base + sum(gate[k] * rank_alone(layer, x, k) for k in range(layer.rank))
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[0]), expected[0])  # one sample, without an axis for samples
        layer.gate = torch.ones(layer.rank)
        torch.testing.assert_close(model(x), plain)
        layer.gate = None
        assert torch.equal(model(x), plain)

    def test_a_gate_per_sample(self, case: str) -> None:
        model, layer, x = make(case)
        gates = torch.rand(2, layer.rank, dtype=torch.float64)
        expected = []
        for gate, sample in zip(gates, x, strict=True):
            layer.gate = gate
            expected.append(model(sample.unsqueeze(0)))
        layer.gate = gates
        torch.testing.assert_close(model(x), torch.cat(expected))
        with pytest.raises(AdapterError, match="gates for 2 samples do not fit"):
            model(x[:1])

    def test_a_state_dict_has_the_gate_in_b(self, case: str) -> None:
        model, layer, x = make(case)
        layer.gate = torch.rand(layer.rank, dtype=torch.float64)
        expected = model(x)
        other, _, _ = make(case)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x), expected)
        assert torch.equal(find_layers(other)["0"].B, fold_gate(layer.B, layer.gate))

    def test_the_gates_gradient(self, case: str) -> None:
        model, layer, x = make(case)
        gate = torch.rand(layer.rank, dtype=torch.float64).requires_grad_()

        def output(gate: Tensor) -> Tensor:
            layer.gate = gate
            found: Tensor = model(x[:1])
            return found

        assert torch.autograd.gradcheck(output, gate)


DORA = [name for name in CASES if "groups" not in CASES[name][1]]


@pytest.mark.parametrize("case", DORA)
def test_dora_with_a_gate_is_pefts_dora_of_gated_ranks(case: str) -> None:
    model, layer, x = make(case, use_dora=True)
    module = layer.module
    module.lora_magnitude_vector["default"].weight.data.mul_(1.3)
    plain = model(x)
    layer.gate = torch.ones(layer.rank)
    torch.testing.assert_close(model(x), plain)
    gates = torch.rand(2, layer.rank, dtype=torch.float64)
    layer.gate = gates
    per_sample = model(x)
    B = layer.B.detach().clone()
    layer.gate = None
    for sample, gate in enumerate(gates):
        with torch.no_grad():
            layer.B.copy_(fold_gate(B, gate))
        torch.testing.assert_close(per_sample[sample], model(x)[sample])


def test_dora_with_dropout() -> None:
    model, layer, x = make("2d", use_dora=True, lora_dropout=0.5)
    model.train()
    torch.manual_seed(1)
    plain = model(x)
    layer.gate = torch.ones(layer.rank)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("case", CASES)
def test_at_rank_0_it_computes_the_base_and_comes_back(case: str) -> None:
    kind, settings = CASES[case]
    _, _, x = make(case)
    # an adapter without any rank is refused, so there is another layer
    base_model = nn.Sequential(kind(4, 8, 3, **settings), nn.Linear(2, 2)).double()
    model = get_peft_model(base_model, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"]))
    layers = find_layers(model)
    layer, module = layers["0"], layers["0"].module
    base = module.get_base_layer()(x)
    resize_(layers, {"0": LayerPlan(())})
    for some in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(some(x), base)
    module(x).sum().backward()
    assert layer.A.grad is not None  # DDP waits for the gradient of every trained parameter
    layer.gate = torch.ones(0)
    assert torch.equal(module(x), base)
    layer.gate = None
    assert find_layers(model).ranks == {"0": 0, "1": 4}
    if case in MERGED:
        model.merge_adapter()
        assert torch.equal(module(x), base)
        model.unmerge_adapter()
    resize_(layers, {"0": LayerPlan((), 1)})
    assert module.lora_variant == {}
    assert module.lora_A["default"].out_channels == layer.axes[0].copies
    layer.B.data.normal_()
    torch.testing.assert_close(module(x), base + rank_alone(layer, x, 0))


@pytest.mark.parametrize("case", MERGED)
def test_a_merge_with_a_gate(case: str) -> None:
    for dora in (False, True):
        model, layer, x = make(case, use_dora=dora)
        layer.gate = torch.rand(layer.rank, dtype=torch.float64)
        expected, before = model(x), layer.module.get_base_layer().weight.detach().clone()
        model.merge_adapter(safe_merge=dora)
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.module.get_base_layer().weight, before)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("case", "why"), [("dilation", r"dilation \(2, 2\)"), ("reflected", "padding_mode='reflect'")])
def test_a_merge_that_would_compute_something_else_is_refused(case: str, why: str) -> None:
    model, layer, x = make(case)
    live = model(x)
    guard_merge(layer.module)
    with pytest.raises(AdapterError, match=f"PEFT's merge would change what the model computes: .*{why}"):
        model.merge_adapter()
    assert torch.equal(model(x), live)
    del layer.module.merge
    model.merge_adapter()
    assert not torch.allclose(model(x), live)  # PEFT's own, without a word


def test_the_merge_of_groups_is_refused_by_peft() -> None:
    model, layer, _ = make("groups")
    layer.gate = torch.ones(layer.rank)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()
