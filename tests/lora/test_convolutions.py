"""Ranks of convolutions move: the function, the gradients and the moments follow, and so do files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import lorank
from lorank.errors import AdapterError, PlanError
from lorank.lora import AdapterLayers, LayerPlan, find_layers, head_groups, resize_, save_adapter
from lorank.lora.basis import Basis
from lorank.lora.io.adapter_validation import WEIGHTS
from lorank.lora.io.standalone import open_standalone
from lorank.lora.kernels.per_head import HeadGroups
from tests.convolutions import KINDS, conv_net, picture_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning",
    "ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape",  # PEFT means lora_bias
)

ADAM = {"lr": 1e-2, "weight_decay": 0.0}


def adapted_net(**lora: object) -> PeftModel:
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": [*KINDS, "head"], **lora}
    return get_peft_model(conv_net(), LoraConfig(**config)).double()  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        batch = picture_batch(seed=step)
        model(batch["pixel_values"].double(), batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)  # type: ignore[arg-type]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(picture_batch(seed=77)["pixel_values"].double()).logits
    return found


def trained() -> tuple[PeftModel, torch.optim.Optimizer, AdapterLayers]:
    model = adapted_net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 3)
    return model, optimizer, find_layers(model)


def test_what_a_rank_is_and_what_it_costs() -> None:
    layers = find_layers(adapted_net())
    for name, layer in layers.items():
        assert layer.rank * layer.rank_parameters == layer.A.numel() + layer.B.numel()
        assert layer.rank_parameters == layer.d_in + layer.d_out
        assert layer.module.r["default"] == layer.module_rank(layer.rank) == 4, name
    assert layers.ranks == dict.fromkeys(layers, 4) | {"grouped": 2}  # one rank of each of the two groups
    assert layers["three"].max_rank == 4
    assert layers["grouped"].max_rank == 4
    assert layers["strided"].max_rank == 8
    assert layers["first"].d_in == 9
    assert layers.parameters == sum(p.numel() for p in layers.model.parameters() if p.requires_grad)
    resolved = lorank.Budget(max_lora_rank=5).resolve(layers)
    assert resolved.caps["grouped"] == 2  # what servers call rank 4
    assert resolved.caps["strided"] == 5


def test_kept_ranks_train_as_beside_dead_ones() -> None:
    """A twin keeps all ranks, and those that leave have zero weights and moments."""
    model, optimizer, layers = trained()
    twin = copy.deepcopy(model)
    twin_layers, twin_optimizer = find_layers(twin), optimizer_of(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    keep = {name: tuple(range(layer.rank))[1::2] for name, layer in layers.items()}
    resize_(layers, {name: LayerPlan(some) for name, some in keep.items()}, optimizer)
    for name, layer in twin_layers.items():
        dead = [rank for rank in range(layer.rank) if rank not in keep[name]]
        for axis, weight in zip(layer.axes, (layer.A, layer.B), strict=True):
            state = twin_optimizer.state[weight]
            for values in (weight.data, state["exp_avg"], state["exp_avg_sq"]):
                matrix = axis.matrix(values).clone()
                matrix.index_fill_(axis.axis, torch.tensor(dead), 0)
                values.copy_(axis.tensor(matrix, values.shape))
    train(model, optimizer, 6)
    train(twin, twin_optimizer, 6)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-9, atol=1e-9)
    for name, layer in layers.items():
        kept = torch.tensor(keep[name])
        torch.testing.assert_close(layer.A_matrix, twin_layers[name].A_matrix[kept], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.B_matrix, twin_layers[name].B_matrix[:, kept], rtol=1e-9, atol=1e-9)


def test_new_ranks_change_no_output_and_begin_as_pefts() -> None:
    model, optimizer, layers = trained()
    resize_(layers, {"three": LayerPlan((1, 2, 3))}, optimizer)  # it was full
    before = logits(model)
    resize_(layers, {name: LayerPlan(tuple(range(layer.rank)), 1) for name, layer in layers.items()}, optimizer)
    torch.testing.assert_close(logits(model), before)
    for layer in layers.values():
        own = layer.A_matrix[-1].reshape(layer.axes[0].copies, -1)
        assert float(own.abs().max()) <= own.shape[1] ** -0.5
        assert float(own.abs().max()) > 0.5 * own.shape[1] ** -0.5
        assert not layer.B_matrix[:, -1].any()
        for weight in (layer.A, layer.B):
            assert optimizer.state[weight]["exp_avg"].shape == weight.shape
    train(model, optimizer, 2)
    assert all(bool(layer.B_matrix[:, -1].any()) for layer in layers.values())


def test_another_basis_changes_no_output() -> None:
    model, optimizer, layers = trained()
    before = logits(model)
    plan = {}
    for name, layer in layers.items():
        matrix = torch.randn(layer.rank, layer.rank, dtype=torch.float64)
        plan[name] = LayerPlan(tuple(range(layer.rank)), basis=Basis(matrix, torch.linalg.inv(matrix)))
    resize_(layers, plan, optimizer)
    torch.testing.assert_close(logits(model), before)
    train(model, optimizer, 2)


@pytest.mark.parametrize("optimizer", ["Adafactor", "SGD"])
def test_other_optimisers_follow(optimizer: str) -> None:
    model = adapted_net()
    made = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    layers = find_layers(model)
    for _ in range(2):
        train(model, made, 2)
        plan = {}
        for name, layer in layers.items():
            basis = Basis(2 * torch.eye(layer.rank).double(), torch.eye(layer.rank).double() / 2)
            plan[name] = LayerPlan(tuple(range(1, layer.rank)), 1, basis=basis)
        resize_(layers, plan, made)
    train(model, made, 1)
    assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "gaussian"}])
def test_files(lora: dict[str, object], tmp_path: Path) -> None:
    targets = [name for name in KINDS if name != "reflected"] if "lora_bias" in lora else KINDS  # it has no bias
    model = adapted_net(target_modules=[*targets], **lora)
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    layers = find_layers(model)
    least = {name: layer.min_rank for name, layer in layers.items()}
    plan = {name: LayerPlan(tuple(range(1, layer.rank)), 1) for name, layer in layers.items()}
    plan["grouped"] = LayerPlan((1,), 2)
    plan["point"] = LayerPlan(tuple(range(least["point"])))
    resize_(layers, plan, optimizer)
    train(model, optimizer, 2)
    expected = logits(model)
    save_adapter(layers, tmp_path)
    plain = PeftModel.from_pretrained(conv_net(), tmp_path).double()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-6, atol=1e-6)  # a file in float64, read in float32
    assert plain.base_model.model.grouped.r["default"] == 6


def test_a_rank_that_does_not_fit_is_refused() -> None:
    layers = find_layers(adapted_net())
    with pytest.raises(PlanError, match=r"three can hold at most min\(d_in, d_out\) = 4 ranks; the plan asks for 5"):
        resize_(layers, {"three": LayerPlan((0, 1, 2, 3), 1)})


def test_heads_are_refused() -> None:
    layers = find_layers(adapted_net())
    with pytest.raises(AdapterError, match="one is a convolution, which has no heads"):
        head_groups(layers, {"one": HeadGroups("rows", 2, 4)})


def test_a_fixed_shape_is_refused() -> None:
    with pytest.raises(AdapterError, match="first is a convolution: ranks can only be reserved"):
        lorank.reserve_(adapted_net())


class TestFinishedAdapters:
    @pytest.mark.parametrize(
        ("A", "B"), [((4, 4, 3), (6, 0, 1)), ((0, 4, 3), (6, 2, 1)), ((4, 4, 3), (6, 3, 1)), ((4, 3, 3), (6, 2, 1))]
    )
    def test_a_file_that_is_none_is_refused(self, A: tuple[int, ...], B: tuple[int, ...], tmp_path: Path) -> None:
        key = "base_model.model.conv.lora_"
        LoraConfig(r=2, target_modules=["conv"]).save_pretrained(tmp_path)
        save_file({f"{key}A.weight": torch.zeros(A), f"{key}B.weight": torch.zeros(B)}, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match=r"conv in .* which are no LoRA of a convolution"):
            open_standalone(tmp_path)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_the_best_approximation(self, groups: int) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)).double()
        model = get_peft_model(base, LoraConfig(r=4 * groups, target_modules=["0"]))
        (layer,) = find_layers(model).values()
        layer.B.data.normal_()
        before = [B @ A for B, A in zip(layer.B_matrix.chunk(groups), layer.A_matrix.chunk(groups, 1), strict=True)]
        lorank.resize_adapter_(model, rank=2)
        after = [B @ A for B, A in zip(layer.B_matrix.chunk(groups), layer.A_matrix.chunk(groups, 1), strict=True)]
        for own, found in zip(before, after, strict=True):
            lost = torch.linalg.svdvals(own)[2:].square().sum()
            torch.testing.assert_close((own - found).square().sum(), lost)

    def test_by_the_command_line_without_the_base_model(self, tmp_path: Path) -> None:
        from typer.testing import CliRunner

        from lorank.cli.app import app

        model, _, layers = trained()
        save_adapter(layers, tmp_path / "made")
        found = CliRunner().invoke(
            app, ["resize", str(tmp_path / "made"), "--rank", "1", "--out", str(tmp_path / "cut")]
        )
        assert found.exit_code == 0, found.output
        lorank.resize_adapter_(model, rank=1)
        plain = PeftModel.from_pretrained(conv_net(), tmp_path / "cut").double()
        assert set(find_layers(plain).ranks.values()) == {1}
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
