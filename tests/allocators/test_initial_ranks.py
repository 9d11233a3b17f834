"""Initial ranks from data: planted updates are found, EVA is PEFT's own, and the budget holds."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import nn

import lorank
from lorank.errors import AdapterError, BudgetError, ValidationBatchError
from lorank.lora import find_layers, save_adapter
from tests.models import adapted, class_batch, tiny_bert, tiny_llama, token_batch


class Apart(nn.Module):
    """Linear maps that do not meet: each learns its own target."""

    def __init__(self, modules: int, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(modules))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self.maps])  # (modules, n, width)


def planted(ranks: list[int], width: int = 24, sizes: list[float] | None = None):
    """A model, and batches from one that differs from it by an update of the given rank in each module."""
    generator = torch.Generator().manual_seed(0)
    base = Apart(len(ranks), width)
    teacher = copy.deepcopy(base)
    for layer, rank, size in zip(teacher.maps, ranks, sizes or [1.0] * len(ranks), strict=True):
        left, right = (torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:, :rank] for _ in range(2))
        layer.weight.data += size * left @ right.T
    batches = []
    for _ in range(4):
        x = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q  # white inputs
        batches.append({"x": x, "labels": teacher(x).detach()})
    return base, batches


def squared(model: nn.Module, batch) -> torch.Tensor:
    return (model(batch["x"]) - batch["labels"]).square().sum()


def wrapped(base: nn.Module, **lora):
    return get_peft_model(base, LoraConfig(**{"r": 3, "target_modules": r"maps\.\d+", **lora}))


class TestByGradient:
    def test_planted_ranks_are_found_exactly(self) -> None:
        base, batches = planted([6, 0, 1, 5])
        model = wrapped(base)
        found = lorank.initial_ranks_(model, batches, loss_fn=squared)
        assert list(found.values()) == [6, 0, 1, 5]
        assert found == find_layers(model).ranks

    def test_larger_updates_come_first(self) -> None:
        base, batches = planted([4, 4, 4], sizes=[1.0, 3.0, 2.0])
        assert list(lorank.initial_ranks_(wrapped(base), batches, loss_fn=squared, budget="6 ranks").values()) == [
            0,
            4,
            2,
        ]

    def test_the_scaling_of_a_module_counts(self) -> None:
        base, batches = planted([4, 4], sizes=[1.0, 1.5])
        model = wrapped(base, r=2, lora_alpha=2, alpha_pattern={"maps.0": 4})
        assert list(lorank.initial_ranks_(model, batches, loss_fn=squared).values()) == [4, 0]

    def test_the_output_does_not_change_and_training_learns_what_was_planted(self) -> None:
        base, batches = planted([6, 0, 1, 5])
        model = wrapped(base)
        before = model(batches[0]["x"])
        lorank.initial_ranks_(model, batches, loss_fn=squared)
        assert torch.equal(model(batches[0]["x"]), before)
        uniform = wrapped(copy.deepcopy(planted([6, 0, 1, 5])[0]))
        losses = []
        for trained in (model, uniform):
            optimizer = torch.optim.Adam((p for p in trained.parameters() if p.requires_grad), lr=2e-2)
            for step in range(300):
                optimizer.zero_grad()
                squared(trained, batches[step % 4]).backward()
                optimizer.step()
            losses.append(sum(squared(trained, batch).item() for batch in batches))
        assert losses[0] < 0.1 * losses[1]


@pytest.mark.parametrize("method", ["gradient", "eva"])
@pytest.mark.parametrize(
    "budget", [None, 3, "40 ranks", "7 ranks", "3000 params", "12kB", {"ranks_per_module": 4, "max_lora_rank": 5}]
)
def test_the_budget_holds_in_every_unit(method: str, budget) -> None:
    model = adapted(tiny_llama(), random_B=False, r=4)
    found = lorank.initial_ranks_(model, [token_batch(rows=8)], method=method, budget=budget)
    layers = find_layers(model)
    resolved = lorank.Budget.parse(budget or "56 ranks").resolve(layers)
    assert resolved.fits(found)
    assert resolved.is_used_up_by(found)
    assert len(set(found.values())) > 1
    assert len({layer.scaling for layer in layers.values()}) == 1


class TestEva:
    @pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")  # PEFT's advice on memory
    @pytest.mark.parametrize("r", [2, 4])
    def test_ranks_and_directions_are_those_of_pefts_own_call(self, r: int) -> None:
        batches = [token_batch(rows=8, padded=True), token_batch(rows=8, padded=True, seed=1)]
        ours = adapted(tiny_llama(), random_B=False, r=r)
        found = lorank.initial_ranks_(ours, batches, method="eva")
        eva = {"init_lora_weights": "eva", "eva_config": EvaConfig()}
        theirs = get_peft_model(tiny_llama(), LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", **eva))
        initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
        expected = find_layers(theirs)
        assert {name: rank for name, rank in found.items() if rank} == expected.ranks
        assert sum(found.values()) == 14 * r
        for name, layer in expected.items():
            mine = find_layers(ours)[name]
            assert torch.equal(mine.A, layer.A)
            assert not mine.B.any()
            assert mine.scaling == layer.scaling

    def test_a_classifier_whose_pooled_inputs_are_few(self) -> None:
        model = adapted(tiny_bert(), random_B=False, r=4, task_type="SEQ_CLS", target_modules=["query", "dense"])
        with pytest.raises(ValidationBatchError, match=r"EVA needs 8 inputs of bert\.pooler\.dense.*has only 4"):
            lorank.initial_ranks_(model, [class_batch()], method="eva")
        assert not any(module._forward_hooks for module in model.modules())
        found = lorank.initial_ranks_(model, [class_batch(rows=12)], method="eva")
        assert sum(found.values()) == 4 * len(found)

    def test_a_transformers_model_with_an_adapter_in_it(self) -> None:
        model = tiny_llama()
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(AdapterError, match="EVA needs a PeftModel"):
            lorank.initial_ranks_(model, [token_batch()], method="eva")
        assert sum(lorank.initial_ranks_(model, [token_batch()]).values()) == 4


@pytest.mark.parametrize("method", ["gradient", "eva"])
def test_alora_goes_on_from_there_and_the_file_is_plain(method: str, tmp_path) -> None:
    model = adapted(tiny_llama(), random_B=False, r=4)
    batches = [token_batch(rows=8)]
    start = lorank.initial_ranks_(model, batches, method=method, budget=4)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    allocator = lorank.ALoRA(budget=4, k1=1, k2=1, unit="steps", rounds=1, per_round=3)
    ranks = lorank.attach(model, optimizer, allocator, total_steps=2, validation_batch=token_batch())
    assert ranks.history[0].ranks == start
    for _ in range(2):
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(ranks.history.allocations) == 1
    assert ranks.layers.total_rank <= 56
    ranks.detach()
    save_adapter(find_layers(model), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_it_is_the_same_every_time() -> None:
    weights = []
    for _ in range(2):
        model = adapted(tiny_llama(), random_B=False)
        torch.manual_seed(len(weights))  # nothing global is read
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data.fill_(0.5)
        lorank.initial_ranks_(model, [token_batch()], seed=3)
        weights.append({name: layer.A.detach().clone() for name, layer in find_layers(model).items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_mistakes() -> None:
    with pytest.raises(AdapterError, match="already has an update"):
        lorank.initial_ranks_(adapted(tiny_llama()), [token_batch()])
    fresh = adapted(tiny_llama(), random_B=False)
    with pytest.raises(BudgetError, match="expected 'gradient' or 'eva'"):
        lorank.initial_ranks_(fresh, [token_batch()], method="magic")
    with pytest.raises(ValidationBatchError, match="no batch"):
        lorank.initial_ranks_(fresh, [])
    with pytest.raises(ValidationBatchError, match="no batch"):
        lorank.initial_ranks_(fresh, [], method="eva")
    assert set(find_layers(fresh).ranks.values()) == {4}
