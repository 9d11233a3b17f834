"""Budgets: what a user may write, what it comes to in a model, and allocators that keep to it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lorank
from lorank.allocators import ALoRA, Budget, Context, StaticLoRA, TrainingInfo
from lorank.allocators.reallocation import prune_and_reallocate
from lorank.config.settings import make_config, to_yaml
from lorank.errors import BudgetError, ScheduleError
from lorank.lora import AdapterLayers, base_parameters, find_layers, resize_, save_adapter
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (8, Budget(ranks_per_module=8)),
        (2.5, Budget(ranks_per_module=2.5)),
        ("8", Budget(ranks_per_module=8)),
        ("8 per module", Budget(ranks_per_module=8)),
        ("7.5 ranks per module", Budget(ranks_per_module=7.5)),
        ("120 ranks", Budget(ranks=120)),
        ("1 rank", Budget(ranks=1)),
        ("0.32%", Budget(percent=0.32)),
        (" .5 % of base ", Budget(percent=0.5)),
        ("0.32% of the base model", Budget(percent=0.32)),
        ("50% of adapter", Budget(percent_of_adapter=50)),
        ("150 % of the adapter", Budget(percent_of_adapter=150)),
        ("4M", Budget(parameters=4_000_000)),
        ("4.1M params", Budget(parameters=4_100_000)),
        ("300k parameters", Budget(parameters=300_000)),
        ("12345 params", Budget(parameters=12345)),
        ("8MB", Budget(bytes=8_000_000)),
        ("8 MiB", Budget(bytes=8 * 2**20)),
        ("512KiB", Budget(bytes=512 * 1024)),
        ("8000 bytes", Budget(bytes=8000)),
        ({"percent": 0.32, "max_lora_rank": 64}, Budget(percent=0.32, max_lora_rank=64)),
        (Budget(ranks=3), Budget(ranks=3)),
    ],
)
def test_what_a_user_may_write(written, meant: Budget) -> None:
    assert Budget.parse(written) == meant


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("8 apples", r"'8 apples': expected 8 \(ranks per module\)"),
        ("8B", "'8B': expected"),  # bytes, or a billion?
        ("", "'': expected"),
        (True, "True: expected"),
        ([8], r"\[8\]: expected"),
        (0, r"Budget\(ranks_per_module=0\): expected a number above 0"),
        (-3, "ranks_per_module=-3"),
        (float("nan"), "expected a number"),
        ("120.5 ranks", r"Budget\(ranks=120\.5\): expected a whole number of at least 1"),
        ("101%", r"percent=101\.0\): expected a number above 0 and at most 100"),
        ({"rank": 8}, r"Budget\(rank=8\): unknown setting; did you mean ranks\?"),
        ({3: 8}, r"unknown setting; expected one of ranks_per_module, ranks, parameters"),
        ({"ranks": "8"}, r"ranks='8'\): expected a whole number"),
        ({"ranks": True, "percent": -1}, r"2 settings of Budget are wrong\n.*ranks=True.*\n.*percent=-1"),
        ({}, "the budget has no limit"),
    ],
)
def test_what_cannot_be_a_budget(written, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(written)


def layers_of(**lora) -> AdapterLayers:
    return find_layers(adapted(tiny_llama(), **lora))


def test_each_unit_is_counted_as_its_user_means_it(tmp_path) -> None:
    layers = layers_of(r=4)
    base = sum(parameter.numel() for parameter in tiny_llama().parameters())
    numbers = sum(4 * (layer.d_in + layer.d_out) for layer in layers.values())
    save_adapter(layers, tmp_path / "adapter")
    on_disk = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = sum(tensor.numel() * tensor.element_size() for tensor in on_disk.values())
    budget = Budget(ranks_per_module=4, ranks=56, parameters=numbers, percent=100 * numbers / base, bytes=saved)
    resolved = budget.resolve(layers)
    assert resolved.is_used_up_by(layers.ranks)
    for unit, amounts in resolved.used(layers.ranks).items():
        assert amounts["used"] == pytest.approx(amounts["limit"], rel=1e-9), unit
    assert resolved.used(layers.ranks)["percent"]["limit"] == pytest.approx(100 * numbers / base)
    json.dumps(resolved.used(layers.ranks))


def test_max_lora_rank_caps_every_module_and_by_itself_keeps_the_number_of_ranks() -> None:
    layers = layers_of(r=4)
    resolved = Budget(max_lora_rank=6).resolve(layers)
    assert set(resolved.caps.values()) == {6}
    assert sum(resolved.uniform().values()) == layers.total_rank
    assert sum(Budget(max_lora_rank=2).resolve(layers).uniform().values()) == 2 * len(layers)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2])
def test_base_parameters_are_those_before_the_adapter(make) -> None:
    plain = make()
    expected = sum(parameter.numel() for parameter in plain.parameters())
    options = {
        tiny_bert: {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        tiny_gpt2: {"fan_in_fan_out": True},
    }
    assert base_parameters(plain) == expected
    assert base_parameters(adapted(plain, **options.get(make, {}))) == expected


def test_base_parameters_of_a_four_bit_model_are_its_real_numbers() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    expected = sum(parameter.numel() for parameter in model.parameters())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                packed = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                packed.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, packed.to("cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) < expected
    assert base_parameters(model) == expected
    assert base_parameters(adapted(model, random_B=False, target_modules=["q_proj", "down_proj"])) == expected


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("1 params", "1 parameters is less than the 48 parameters that 14 modules need at least"),
        ({"percent": 0.0001}, r"budget of 0.0001 per cent of the base model \(0 parameters\) is less than the 0.2446"),
        (0.01, "ranks per module is less than"),
        (33, r"33 ranks per module is more than the 2\d.* modules can hold"),
        ({"ranks_per_module": 8, "max_lora_rank": 4}, "8 ranks per module is more than the 4 .* at most 4 in each"),
    ],
)
def test_a_budget_that_does_not_fit_the_modules(budget, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(budget).resolve(layers_of(r=4))


def test_one_generous_limit_beside_a_tight_one_is_no_mistake() -> None:
    resolved = Budget(ranks=20, bytes=10**12).resolve(layers_of(r=4))
    assert sum(resolved.uniform().values()) == 20


def start(allocator, layers: AdapterLayers) -> dict[str, int]:
    resize_(layers, allocator.initial_plan(Context(0, TrainingInfo(total_steps=10), layers.model, layers)))
    return layers.ranks


@pytest.mark.parametrize("method", [ALoRA, StaticLoRA])
def test_a_run_starts_at_its_budget(method) -> None:
    assert start(method(), layers_of(r=3)) == layers_of(r=3).ranks
    assert set(start(method(budget=5), layers_of(r=3)).values()) == {5}
    layers = layers_of(r=8)
    before = [layer.scaling for layer in layers.values()]
    assert sum(start(method(budget="20 ranks"), layers).values()) == 20
    assert [layer.scaling for layer in layers.values()] == before
    assert sorted(set(layers.ranks.values())) == [1, 2]


def test_ranks_that_somebody_chose_stay_when_they_use_up_the_budget() -> None:
    layers = layers_of(r=4, rank_pattern={"q_proj": 6, "v_proj": 2})
    assert start(StaticLoRA(budget=4), layers) == layers_of(r=4, rank_pattern={"q_proj": 6, "v_proj": 2}).ranks
    assert set(start(StaticLoRA(budget=5), layers).values()) == {5}


def test_settings_that_mean_the_same_describe_the_same_and_are_plain_data() -> None:
    described = [ALoRA(budget=budget).describe() for budget in ("8", 8, 8.0, {"ranks_per_module": 8}, Budget(8))]
    assert all(one == described[0] for one in described)
    assert json.loads(json.dumps(described[0])) == described[0]
    assert described[0]["budget"] == asdict(Budget(ranks_per_module=8))
    assert ALoRA().describe()["budget"] is None


@pytest.mark.parametrize("budget", [8, "0.32%", {"percent": 0.32, "max_lora_rank": 64}, None])
def test_a_budget_in_a_configuration(budget) -> None:
    values = {
        "model": {"name": "tiny"},
        "task": {"name": "language_modelling", "data": "python_reference"},
        "allocator": {"name": "alora", "budget": budget},
        "output_dir": "runs/x",
    }
    config = make_config(values)
    assert config.allocator.build() == ALoRA(budget=budget)
    import yaml

    assert make_config(yaml.safe_load(to_yaml(config))) == config


def test_a_wrong_budget_in_a_configuration_is_listed_with_its_key() -> None:
    values = {
        "model": {"name": "tiny"},
        "task": {"name": "language_modelling", "data": "python_reference"},
        "allocator": {"name": "static", "budget": "8 apples"},
        "output_dir": "runs/x",
    }
    with pytest.raises(Exception, match=r"allocator.*'8 apples': expected 8 \(ranks per module\)"):
        make_config(values)


@pytest.mark.parametrize("method", [lorank.ALoRA, lorank.StaticLoRA, lorank.AdaLoRA, lorank.SoRA, lorank.ARDLoRA])
def test_per_cent_of_the_adapter_are_of_the_adapter_as_it_was_made(method: type[lorank.Allocator]) -> None:
    """Not of the present one: a resumed run has other ranks, and the same budget."""
    made = layers_of(r=4)
    numbers = made.parameters
    run = TrainingInfo(total_steps=100, initial_ranks=made.ranks)
    budget = method(budget="50% of adapter").resolve_budget(made, run)
    assert budget.constraints[0].limit == numbers // 2
    later = layers_of(r=1)
    assert method(budget="50% of adapter").resolve_budget(later, run) == budget
    assert "50 per cent of the adapter as it was made" in budget.describe()


class TestALoRAUnderABudget:
    def test_the_start_counts_the_budgets_ranks(self) -> None:
        with pytest.raises(ScheduleError, match=r"n_A = 14 ranks .* have 10 in all"):
            ALoRA(budget="10 ranks", per_round=14).start(layers_of(r=4), TrainingInfo(total_steps=10))
        assert ALoRA(budget="20 ranks", per_round=14).start(layers_of(r=1), TrainingInfo(total_steps=10)) == {}

    @settings(deadline=None, max_examples=40)
    @given(st.data())
    def test_rounds_never_leave_the_budget_in_any_unit_and_use_up_what_they_may(self, data: st.DataObject) -> None:
        layers = self.shared()
        unit = data.draw(st.sampled_from(["ranks", "parameters", "bytes"]))
        full = {"ranks": 56, "parameters": 4096, "bytes": 16500}[unit]
        budget = Budget(**{unit: full}, max_lora_rank=data.draw(st.sampled_from([5, 9, 32])))
        resolved = budget.resolve(layers)
        ranks = resolved.uniform()
        for _ in range(4):
            scores = {
                name: torch.tensor(data.draw(st.lists(st.floats(-5, 5, width=32), min_size=rank, max_size=rank)))
                for name, rank in ranks.items()
            }
            count = data.draw(st.integers(1, max(1, min(8, sum(ranks.values()) - 1))))
            plan = prune_and_reallocate(
                scores, count, {n: layer.max_rank for n, layer in layers.items()}, budget=resolved
            )
            after = {name: plan[name].rank if name in plan else rank for name, rank in ranks.items()}
            assert resolved.fits(after)
            unhurt = [
                name
                for name, rank in ranks.items()
                if rank
                and after[name] >= rank
                and name not in {n for n, change in plan.items() if len(change.keep) < ranks[n]}
            ]
            assert not any(resolved.room(after, name) for name in unhurt)
            ranks = after

    def shared(self, made: list[AdapterLayers] = []) -> AdapterLayers:  # noqa: B006  # made once for all examples
        if not made:
            made.append(layers_of(r=4))
        return made[0]

    def test_gifts_are_as_dear_as_what_was_freed(self) -> None:
        from lorank.allocators.resolved_budget import Constraint, ResolvedBudget

        resolved = ResolvedBudget(
            (Constraint("parameters", {"wide": 10, "slim": 3, "other": 4}, 47),),
            dict.fromkeys(("wide", "slim", "other"), 9),
            dict.fromkeys(("wide", "slim", "other"), 0),
        )
        scores = {"wide": torch.tensor([0.1, 3.0, 3.0]), "slim": torch.tensor([5.0, 5.0, 5.0]), "other": torch.ones(2)}
        plan = prune_and_reallocate(scores, 1, resolved.caps, budget=resolved)
        # 10 parameters are freed: turns of 3 (slim, the better one) and 4 (other), and 3 more for slim
        assert plan["wide"].keep == (1, 2)
        assert (plan["slim"].add, plan["other"].add) == (2, 1)

    def test_a_module_that_needs_its_last_rank_keeps_it_and_the_next_lowest_goes(self) -> None:
        scores = {"a": torch.tensor([0.1]), "b": torch.tensor([0.3, 0.2, 9.0]), "c": torch.tensor([5.0])}
        plan = prune_and_reallocate(scores, 2, dict.fromkeys("abc", 9), minima={"a": 1, "b": 1, "c": 1})
        assert plan["b"].keep == (2,)
        assert "a" not in plan or plan["a"].keep == (0,)
        assert plan["c"].add == 1
