"""What is written to disk computes what is live, for every initialisation of PEFT's, or `attach` refuses it.

init_lora_weights × bias × use_dora × tied weights, with lora_bias and rsLoRA in addition: a few steps of a method that
moves ranks and empties modules, then the file is loaded in plain PEFT onto a base made anew. After a refusal the model,
the configuration and the optimiser are as before, and each remedy that the message names works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.tuners.lora.layer
import pytest
import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorank
from lorank.allocators import Allocation, Allocator, Context, State, TrainingInfo
from lorank.errors import AdapterError, LorankError
from lorank.lora import LayerPlan, check_base_unchanged, find_layers, load_adapter, plan_for_rank, resize_, save_adapter
from lorank.testing import plain_peft
from tests.methods import METHODS, STEPS
from tests.models import tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's advice on initialisations and tied weights

BASE_STAYS = (True, False, "gaussian", "orthogonal", "eva")
BASE_CHANGES = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
INITS = (*BASE_STAYS, *BASE_CHANGES, "mica")
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
CONFIGS: dict[Any, dict[str, Any]] = {
    "eva": {"eva_config": EvaConfig()},
    "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
    "loftq": {"loftq_config": LoftQConfig(loftq_bits=4)},
}


@dataclass(frozen=True)
class EmptyAndMove(Allocator):
    """After steps 2 and 4: half of the modules lose all ranks that they can lose, the others gain some and lose one."""

    def due(self, step: int, run: TrainingInfo) -> bool:
        return step in (2, 4)

    def allocate(self, context: Context, state: State) -> Allocation:
        plan = {}
        for position, (name, layer) in enumerate(context.layers.items()):
            if layer.rank and (position + context.step // 2) % 2:
                plan[name] = LayerPlan(tuple(range(layer.min_rank)))
            else:
                plan[name] = LayerPlan(tuple(range(1, layer.rank)), 2 + position)
        return Allocation(plan)


def base(tied: str | None = None) -> nn.Module:
    return tiny_llama(1, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied is not None)


def make(init: Any, tied: str | None = None, **lora: Any) -> PeftModel:
    """A fresh adapter, made with PEFT's own preparation on a tiny batch where the initialisation needs data."""
    model, targets, batch = base(tied), list(TARGETS), token_batch(rows=8)
    if tied is not None:
        lora["ensure_weight_tying"] = True
    if tied == "modules_to_save":
        lora["modules_to_save"] = ["embed_tokens"]
    if tied == "lora":
        targets.append("embed_tokens")
    own = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": init, **CONFIGS.get(init, {})}
    config = LoraConfig(**{**own, **lora})
    if init == "corda":
        # preprocess_corda needs a package that PEFT does not install. It leaves these factors on the modules; here
        # they are those of inputs without correlation.
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                U, S, V = torch.svd(module.weight.data)
                module.eigens = SimpleNamespace(U_WC=U[:, :4], S_WC=S[:4], V_WC=V[:, :4])
    if init == "lora_ga":
        preprocess_loraga(model, config, lambda: model(**batch).loss.backward())  # noqa: PLW0108  # at its call
        model.zero_grad()
    adapted = get_peft_model(model, config)
    if init == "eva":
        initialize_lora_eva_weights(adapted, [batch], show_progress_bar=False)
    return adapted


@pytest.fixture(autouse=True)
def loftq_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ computes on CUDA only. The same in short: 4 bits, and a LoRA of what they lose."""

    def loftq_init(weight: Tensor, *, num_bits: int, reduced_rank: int, num_iter: int) -> tuple[Tensor, Tensor, Tensor]:
        step = weight.detach().abs().max() / 2 ** (num_bits - 1)
        rounded = (weight.detach() / step).round() * step
        U, S, Vh = torch.linalg.svd(weight.detach() - rounded)
        root = S[:reduced_rank].sqrt()
        return rounded, root[:, None] * Vh[:reduced_rank], U[:, :reduced_rank] * root

    monkeypatch.setattr(peft.tuners.lora.layer, "loftq_init", loftq_init)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for step in range(steps):
        model(**token_batch(seed=step % 3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(model: nn.Module, allocator: Allocator, steps: int) -> dict[str, int]:
    optimizer = optimizer_of(model)
    batch = token_batch(seed=9) if allocator.needs_validation_batch else None
    ranks = lorank.attach(model, optimizer, allocator, validation_batch=batch, total_steps=steps)
    train(model, optimizer, steps)
    ranks.detach()
    return ranks.layers.ranks


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=token_batch(seed=5)["input_ids"]).logits


def gap(model: nn.Module, other: Tensor) -> float:
    """The largest difference of the logits, relative to the largest logit."""
    return float((logits(model) - other).abs().max() / other.abs().max())


def everything(model: PeftModel, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """All that a refused `attach` must leave as it was."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._load_state_dict_pre_hooks))
        for name, module in model.named_modules()
    ]
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.layer.LoraLayer)]
    fields = [(dict(x.r), dict(x.lora_alpha), dict(x.scaling), dict(x.lora_variant)) for x in layers]
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        copy.deepcopy(model.peft_config["default"].to_dict()),
        hooks,
        fields,
        copy.deepcopy(optimizer.state_dict()),
    )


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert before.shape == after.shape
        assert torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert_same(value, after[key])
    elif isinstance(before, list | tuple):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


COMBINATIONS = [
    {"bias": bias, "use_dora": dora, **extra}
    for bias in ("none", "all", "lora_only")
    for dora in (False, True)
    for extra in ({}, {"lora_bias": True}, {"use_rslora": True})
    if not extra or bias == "none"
]
REFUSED_BY_PEFT: list[Callable[[Any, str | None, dict[str, Any]], bool]] = [
    lambda init, tied, lora: "lora_bias" in lora and (init not in (True, False) or lora["use_dora"]),
    lambda init, tied, lora: "lora_bias" in lora and tied == "lora",  # embeddings
    lambda init, tied, lora: init == "mica" and lora["use_dora"],
    lambda init, tied, lora: init in ("corda", "loftq") and tied == "lora",  # embeddings
]


@pytest.mark.parametrize("tied", [None, "modules_to_save", "lora"])
@pytest.mark.parametrize("init", INITS)
def test_live_equals_reloaded_or_attach_refuses_and_changes_nothing(
    init: Any, tied: str | None, tmp_path: Path
) -> None:
    for number, options in enumerate(COMBINATIONS):
        case = f"init_lora_weights={init!r}, tied={tied}, {options}"
        if any(refuses(init, tied, options) for refuses in REFUSED_BY_PEFT):
            with pytest.raises((ValueError, TypeError)):
                make(init, tied, **options)
            continue
        model = make(init, tied, **options)
        optimizer = optimizer_of(model)
        train(model, optimizer, 1)
        before = everything(model, optimizer)
        try:
            ranks = run(model, EmptyAndMove(), 6)
        except LorankError:
            assert init not in BASE_STAYS or tied == "lora", case
            assert_same(before, everything(model, optimizer))
            continue
        assert init in BASE_STAYS, case
        assert len(set(ranks.values())) > 1, case
        plain = options["bias"] == "none" and not options["use_dora"] and "lora_bias" not in options
        assert any(rank == 0 for rank in ranks.values()) == plain, case
        expected, folder = logits(model), tmp_path / str(number)
        model.save_pretrained(folder)
        found = gap(PeftModel.from_pretrained(base(tied), folder), expected)
        assert found <= 1e-6, f"{case}: live and reloaded differ by {found:.2g}"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("extra", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_no_method_takes_the_last_rank_of_a_module_with_a_trained_bias(
    name: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    method = METHODS[name]
    if method.heads:  # where a head may lose all its ranks, a module may
        with pytest.raises(LorankError, match=r"has a bias in lora_B|needs a rank.*use min_rank=1"):
            run(make(True, **method.lora, **extra), method.make(), STEPS)
        return
    model = make(True, **{"r": 3, **method.lora}, **extra)
    ranks = run(model, method.make(), STEPS)
    assert min(ranks.values()) >= 1
    save_adapter(find_layers(model), tmp_path / "adapter")
    assert gap(PeftModel.from_pretrained(base(), tmp_path / "adapter"), logits(model)) <= 1e-6


def test_a_budget_below_the_ranks_that_biases_need_is_refused() -> None:
    model = make(True, bias="all")
    with pytest.raises(lorank.BudgetError, match=r"4 modules need at least \(one rank each: DoRA and trained biases"):
        lorank.initial_ranks_(model, [token_batch()], budget="3 ranks")
    assert set(lorank.initial_ranks_(model, [token_batch()], budget="4 ranks").values()) == {1}


@pytest.mark.parametrize(
    ("init", "bias"), [(True, "all"), (True, "lora_only"), ("orthogonal", "none"), ("eva", "none")]
)
def test_a_process_that_never_imports_lorank_computes_the_same(init: Any, bias: str, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = make(init, bias=bias)
    run(model, EmptyAndMove(), 6)
    save_adapter(find_layers(model), tmp_path / "adapter")
    expected = logits(model)
    found = plain_peft().logits(
        tmp_path / "base", tmp_path / "adapter", {"input_ids": token_batch(seed=5)["input_ids"]}
    )
    assert (found["logits"] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_tokens_that_are_trained_beside_the_ranks_are_kept(tmp_path: Path) -> None:
    model = make(True, trainable_token_indices=[3, 4, 5])
    assert min(run(model, EmptyAndMove(), 6).values()) == 0
    model.save_pretrained(tmp_path)
    assert gap(PeftModel.from_pretrained(base(), tmp_path), logits(model)) <= 1e-6


def test_a_module_that_was_emptied_before_the_run_and_gets_ranks_in_it_is_saved(tmp_path: Path) -> None:
    model = make(True)
    layers = find_layers(model)
    names = list(layers)
    resize_(layers, {name: LayerPlan(()) for name in names[::2]})  # as initial_ranks_ may do
    assert min(run(model, EmptyAndMove(), 3).values()) > 0
    model.save_pretrained(tmp_path)
    assert gap(PeftModel.from_pretrained(base(), tmp_path), logits(model)) <= 1e-6


# Initialisations that leave the base as it is


@pytest.mark.parametrize("init", BASE_STAYS)
def test_once_ranks_have_moved_the_config_names_an_initialisation_that_any_rank_can_load(init: Any) -> None:
    model = make(init)
    layers = find_layers(model)
    resize_(layers, {})
    assert layers.config.init_lora_weights == init  # nothing moved
    resize_(layers, {next(iter(layers)): LayerPlan((0, 1, 2))})
    assert layers.config.init_lora_weights == (True if init in ("orthogonal", "eva") else init)
    assert layers.config.eva_config is None


def test_a_refused_run_leaves_the_initialisation_in_the_config() -> None:
    model = make("eva")
    config = model.peft_config["default"]

    class Fails(EmptyAndMove):
        def initial_plan(self, context: Any) -> Any:
            return {name: plan_for_rank(layer.rank, 3) for name, layer in context.layers.items()}

        def start(self, layers: Any, run: TrainingInfo) -> State:
            assert layers.config.init_lora_weights is True
            raise LorankError("the settings do not fit")

    with pytest.raises(LorankError, match="do not fit"):
        lorank.attach(model, optimizer_of(model), Fails(), total_steps=6)
    assert config.init_lora_weights == "eva"
    assert isinstance(config.eva_config, EvaConfig)


# Initialisations that change the base


@pytest.mark.parametrize("init", BASE_CHANGES)
def test_ranks_do_not_move_where_the_base_was_changed(init: str, tmp_path: Path) -> None:
    model = make(init)
    layers = find_layers(model)
    name = next(iter(layers))
    message = rf"made with init_lora_weights='{init}', which changed the base weights.*docs/compatibility.md"
    before = everything(model, optimizer_of(model))
    with pytest.raises(AdapterError, match=message):
        resize_(layers, {name: LayerPlan((0,))})
    with pytest.raises(AdapterError, match=message):
        lorank.initial_ranks_(model, [token_batch()])
    with pytest.raises(AdapterError, match=message):  # a budget that plain LoRA reaches by a resize at the start
        lorank.attach(model, optimizer_of(model), lorank.StaticLoRA(budget="3 ranks"), total_steps=3)
    assert_same(before, everything(model, optimizer_of(model)))
    assert run(model, lorank.StaticLoRA(), 3) == layers.ranks  # no rank moves: this is PEFT's own business
    assert layers.config.init_lora_weights == init
    model.save_pretrained(tmp_path)
    if init in ("corda", "lora_ga"):  # PEFT cannot repeat the change
        with pytest.raises(AdapterError, match="changed the base weights by statistics of data"):
            load_adapter(base(), tmp_path)
    else:
        assert gap(load_adapter(base(), tmp_path), logits(model)) <= 1e-5


@pytest.mark.parametrize("init", BASE_CHANGES)
def test_the_remedy_make_it_with_another_initialisation(init: str) -> None:
    for instead in (True, "gaussian", "orthogonal", "eva"):
        with pytest.raises(AdapterError, match=str(instead)):
            check_base_unchanged(find_layers(make(init)))
        check_base_unchanged(find_layers(make(instead)))


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_the_remedy_convert_it_to_a_plain_lora_of_the_unchanged_base(init: str, tmp_path: Path) -> None:
    """As docs/compatibility.md shows it; then ranks move, and the file computes what is live."""
    model = make(init)
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init
    train(model, optimizer_of(model), 3)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    trained = logits(model)

    converted = PeftModel.from_pretrained(base(), tmp_path / "plain", is_trainable=True)
    assert set(find_layers(converted).ranks.values()) == {8}
    assert gap(converted, trained) <= 1e-5
    assert min(run(converted, EmptyAndMove(), 6).values()) == 0
    converted.save_pretrained(tmp_path / "moved")
    base().save_pretrained(tmp_path / "base")
    expected = logits(converted)
    found = plain_peft().logits(tmp_path / "base", tmp_path / "moved", {"input_ids": token_batch(seed=5)["input_ids"]})
    assert (found["logits"] - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("init", ["loftq", "pissa", "lora_ga"])
def test_the_remedy_save_the_changed_base_as_a_base_of_its_own(init: str, tmp_path: Path) -> None:
    """As docs/compatibility.md shows it; then ranks move, and the file computes what is live."""
    model = make(init)
    config = model.peft_config["default"]
    config.init_lora_weights, config.base_model_name_or_path = True, str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    at_the_start = logits(model)
    model.unload().save_pretrained(tmp_path / "base")

    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(changed, tmp_path / "adapter", is_trainable=True)
    assert gap(again, at_the_start) <= 1e-6
    assert min(run(again, EmptyAndMove(), 6).values()) == 0
    again.save_pretrained(tmp_path / "moved")
    expected = logits(again)
    found = plain_peft().logits(tmp_path / "base", tmp_path / "moved", {"input_ids": token_batch(seed=5)["input_ids"]})
    assert (found["logits"] - expected).abs().max() <= 1e-6 * expected.abs().max()
