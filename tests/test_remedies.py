"""What a message tells the user to do is done here, and works.

Each case makes a mistake, finds the remedy in the message, follows it, and trains a few steps or does what the message
is about. A remedy of another kind of machine (several processes, a GPU) is tested with its backend.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Trainer,
    TrainingArguments,
)

import lorank
from lorank.errors import LorankError
from lorank.lora import HeadGroups, find_layers, split_into_heads_
from tests.messages import warnings_of_lorank
from tests.models import VOCABULARY, adapted, tiny_llama, token_batch
from tests.moe import tiny_mixtral
from tests.quantised import bnb4, bnb8, quanto, torchao8, torchao8_dynamic

SORA = lorank.SoRA(prune_every=2)
HEADS = lorank.ARDLoRA(alpha_lr=0.05, resize_every=2)
MODULES = lorank.ARDLoRA(alpha_lr=0.05, resize_every=2, heads="module")
ALORA = lorank.ALoRA(k1=2, k2=2, rounds=2, unit="steps", per_round=2)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(
    model: nn.Module, method: lorank.Allocator = SORA, batch: dict[str, Any] | None = None, **options: Any
) -> lorank.Ranks:
    """A run of 8 steps, in which ranks may move."""
    batch = token_batch() if batch is None else batch
    optimizer = options.pop("optimizer", None) or adamw(model)
    ranks = lorank.attach(model, optimizer, method, **{"total_steps": 8, "validation_batch": batch, **options})
    model.train()
    for _ in range(8):
        output = model(**batch)
        loss: torch.Tensor = output["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks.step == 8
    return ranks


def fresh(**lora: Any) -> PeftModel:
    return adapted(tiny_llama(1), random_B=False, **lora)


# Modules that lorank does not take. The message gives a LoraConfig for the same base model.


WORDS = {"input_ids": token_batch()["input_ids"], "labels": torch.arange(4)}


class Net(nn.Module):
    """Words, a convolution over them, attention, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.classifier = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids)  # (n, T, 16)
        hidden = self.encoder(hidden + self.mix(hidden.transpose(1, 2)).transpose(1, 2))
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        logits = self.classifier(hidden.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OnlyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4)


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "attention": (Net, {"target_modules": ["attention"]}, WORDS),
    "inside attention": (Net, {"target_modules": "all-linear"}, WORDS),
    "attention beside a parameter": (
        Net,
        {"target_modules": ["attention"], "target_parameters": ["classifier.0.weight"]},
        WORDS,
    ),
}


@pytest.fixture
def slow_path() -> Any:
    """The remedy for nn.TransformerEncoderLayer, which computes without its layers in evaluation mode."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's own, for experts
@pytest.mark.parametrize("name", KINDS)
def test_a_module_that_is_not_taken(name: str, slow_path: None) -> None:
    make, lora, batch = KINDS[name]
    with pytest.raises(LorankError) as found:
        train(get_peft_model(make(), LoraConfig(r=2, **lora)), batch=batch)
    message = str(found.value)
    assert "load_in_4bit" not in message
    assert "exclude_modules" not in message
    advice = re.search(r"LoraConfig\(target_modules=(\[.*?\])(?:, target_parameters=(\[.*?\]))?\)", message)
    assert advice is not None
    targets, parameters = (None if one is None else ast.literal_eval(one) for one in advice.groups())
    config = LoraConfig(r=2, target_modules=targets, target_parameters=parameters)
    ranks = train(get_peft_model(make(), config), batch=batch)
    assert len(ranks.layers) >= 1
    assert parameters is None or parameters[0] in ranks.layers


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's own, for experts
def test_all_linear_of_a_mixture_of_experts_takes_the_experts() -> None:
    ranks = train(get_peft_model(tiny_mixtral(), LoraConfig(r=2, target_modules="all-linear")), batch=token_batch())
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj"} < ranks.layers.keys()


def test_a_model_without_any_module_to_take() -> None:
    model = get_peft_model(OnlyAttention(), LoraConfig(r=2, target_modules=["attn"]))
    with pytest.raises(LorankError, match=r"no other linear layer, embedding or convolution.*cannot be used with it"):
        lorank.attach(model, adamw(model), SORA, total_steps=8)


@pytest.mark.parametrize("scores", ["first_order", "exact"])
def test_layers_that_do_not_run_in_evaluation_mode(scores: str) -> None:
    """Exact scores were the same for every rank, without a word."""
    method = lorank.ALoRA(k1=2, k2=2, rounds=2, unit="steps", per_round=2, scores=scores)  # type: ignore[arg-type]
    targets = ["linear1", "linear2"]
    with pytest.raises(LorankError, match=r"calls none of the 4 adapted modules .*set_fastpath_enabled\(False\)"):
        train(get_peft_model(Net(), LoraConfig(r=2, target_modules=targets)), method, WORDS)
    with warnings_of_lorank() as heard:
        train(get_peft_model(Net(), LoraConfig(r=2, target_modules=[*targets, "classifier.0"])), method, WORDS)
    assert any(re.search(r"4 of 5 adapted modules do not run .*set_fastpath_enabled\(False\)", text) for text in heard)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        ranks = train(get_peft_model(Net(), LoraConfig(r=2, target_modules=targets)), method, WORDS)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    last = list(ranks.history)[-1].scores
    assert len({score for scores in last.values() for score in scores}) > 4


# Other mistakes.


@dataclass(frozen=True)
class Case:
    """A mistake and its remedy.

    Args:
        mistake: raises the error.
        message: a pattern of the message that contains the remedy.
        remedy: follows it.
    """

    mistake: Callable[[], object]
    message: str
    remedy: Callable[[], object]


def two_adapters() -> PeftModel:
    model = fresh()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(undo: bool) -> PeftModel:
    model = fresh()
    model.merge_adapter()
    if undo:
        model.unmerge_adapter()
    return model


def finished_heads() -> PeftModel:
    """A model whose run per head was ended, as the message says."""
    model = fresh()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, HEADS, total_steps=8)
    model(**token_batch()).loss.backward()
    optimizer.step()
    ranks.finish()
    ranks.detach()
    return model


def with_bias() -> PeftModel:
    base = tiny_llama(1, attention_bias=True)
    return adapted(base, random_B=False, lora_bias=True, target_modules=["q_proj", "v_proj"])


def split(model: PeftModel) -> PeftModel:
    layers = find_layers(model)
    split_into_heads_(layers, HEADS.heads_of(layers))
    return model


def merge(model: PeftModel, *, reload_on: Callable[[], nn.Module] | None = None) -> None:
    """Merges the adapter; with ``reload_on``, the saved adapter into another base model. The logits must stay."""
    import tempfile

    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: merging into a quantised weight rounds it
        live = model(**token_batch()).logits
        if reload_on is not None:
            lorank.save_adapter(find_layers(model), Path(folder) / "adapter")
            model = PeftModel.from_pretrained(reload_on(), Path(folder) / "adapter")
        plain = model.get_base_model()
        with model.disable_adapter():
            base = plain(**token_batch()).logits
        after = model.merge_and_unload()(**token_batch()).logits
    moved = float((live - base).norm())
    assert float((after - live).norm()) < 0.4 * moved or reload_on is not None
    assert float((after - base).norm()) > 0.5 * moved  # the adapter is there


def base_for_quantised() -> nn.Module:
    from tests.quantised import load

    return load()


def gated(make: Callable[[], nn.Module]) -> PeftModel:
    model = adapted(make())
    layers = find_layers(model)
    layers.learn_gates(torch.linspace(0.5, 1.5, layers.total_rank))
    return model


def after_the_run(make: Callable[[], nn.Module]) -> PeftModel:
    model = adapted(make(), random_B=False)
    ranks = train(model)
    ranks.detach()
    return model


def without_grad(wrap: Any) -> None:
    model = adapted(tiny_llama(1))
    layers = find_layers(model)
    name = next(iter(layers))
    with wrap:
        lorank.lora.resize_(layers, {name: lorank.plan_for_rank(4, 2)})
    assert layers[name].rank == 2


def wrong_optimizer(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_A" in n], lr=1e-2)


def losing(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        loss: torch.Tensor = model(**batch).loss
    return loss


def keeping(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


class Compiled:
    """A model that torch.compile has been called on, without compiling anything."""

    def __new__(cls, method: lorank.Allocator) -> lorank.Ranks:  # type: ignore[misc]  # a function in all but name
        return train(torch.compile(fresh(), backend="eager"), method)


CASES: dict[str, Case] = {
    "no adapter": Case(
        lambda: train(tiny_llama(1)),
        r"model = get_peft_model\(model, LoraConfig\(r=8, target_modules='all-linear'\)\)",
        lambda: train(get_peft_model(tiny_llama(1), LoraConfig(r=8, target_modules="all-linear"))),
    ),
    "several adapters": Case(
        lambda: find_layers(two_adapters()),
        r"choose one with adapter=…",
        lambda: find_layers(two_adapters(), adapter="second"),
    ),
    "merged": Case(lambda: train(merged(undo=False)), r"model\.unmerge_adapter\(\)", lambda: train(merged(undo=True))),
    "an unsupported variant": Case(
        lambda: train(fresh(alora_invocation_tokens=[5], task_type="CAUSAL_LM")),
        r"as plain LoRA, LoraConfig\(init_lora_weights=True\), or with use_dora=True",
        lambda: (train(fresh()), train(fresh(use_dora=True))),
    ),
    "the optimiser of something else": Case(
        lambda: train(model := fresh(), optimizer=wrong_optimizer(model)),
        r"AdamW\(p for p in model\.parameters\(\) if p\.requires_grad\)",
        lambda: train(model := fresh(), optimizer=torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)),
    ),
    "ranks reserved without DeepSpeed": Case(
        lambda: train(lorank.reserve_(fresh(), 8)), r"leave out reserve_", lambda: train(fresh())
    ),
    "inference mode": Case(
        lambda: without_grad(torch.inference_mode()), r"use torch\.no_grad\(\)", lambda: without_grad(torch.no_grad())
    ),
    "heads of a trained adapter": Case(
        lambda: train(adapted(tiny_llama(1)), HEADS),
        r"Start from a fresh adapter, or keep one rank per module with heads='module'",
        lambda: (train(fresh(), HEADS), train(adapted(tiny_llama(1)), MODULES)),
    ),
    "heads with DoRA": Case(
        lambda: train(fresh(use_dora=True), HEADS), r"heads='module'", lambda: train(fresh(use_dora=True), MODULES)
    ),
    "heads with a bias": Case(
        lambda: train(with_bias(), HEADS),
        r"make the adapter without lora_bias, or keep one rank per module with heads='module'",
        lambda: (train(fresh(), HEADS), train(with_bias(), MODULES)),
    ),
    "heads twice": Case(
        lambda: split(split(fresh())),
        r"end its run with ranks\.finish\(\), and start the next run from a fresh adapter",
        lambda: (finished_heads().merge_and_unload(), train(fresh(), HEADS)),
    ),
    "heads under torch.compile": Case(
        lambda: Compiled(HEADS),
        r"Train without torch\.compile, or keep one rank per module with heads='module'",
        lambda: (train(fresh(), HEADS), Compiled(MODULES)),
    ),
    "heads that nobody has": Case(
        lambda: train(fresh(), lorank.ARDLoRA(head_overrides={"qq": HeadGroups("rows", 4, 8)})),
        r"name a module in full, e\.g\. .*or give the end of its name",
        lambda: train(fresh(), lorank.ARDLoRA(head_overrides={"q_proj": HeadGroups("rows", 4, 8)})),
    ),
    "DoRA over int8": Case(
        lambda: train(adapted(bnb8(), use_dora=True)),
        r"Use LoRA without DoRA, or a base in nf4",
        lambda: (train(adapted(bnb8())), train(adapted(bnb4(), use_dora=True))),
    ),
    "quantised activations": Case(
        lambda: train(adapted(torchao8_dynamic())),
        r"Load the base model unquantised, or with bitsandbytes \(load_in_4bit, load_in_8bit\), torchao's Int8Weight",
        lambda: [train(adapted(make())) for make in (base_for_quantised, bnb4, bnb8, torchao8)],
    ),
    "merging gates into torchao": Case(
        lambda: merge(gated(torchao8)),
        r"End the run first \(ranks\.finish\(\)\); or save the adapter, load it from the file, and merge the loaded",
        lambda: (merge(after_the_run(torchao8)), merge(gated(torchao8), reload_on=torchao8)),
    ),
    "merging DoRA into torchao": Case(
        lambda: merge(dora_over_torchao()),
        r"Save the adapter, and merge it into the unquantised base model",
        lambda: merge(dora_over_torchao(), reload_on=base_for_quantised),
    ),
    "merging into quanto": Case(
        lambda: merge(over_quanto()),
        r"Save the adapter, and merge it into the unquantised base model",
        lambda: merge(over_quanto(), reload_on=base_for_quantised),
    ),
    "no batch": Case(
        lambda: train(fresh(), ALORA, validation_batch=None),
        r"use attach\(…, validation_batch=batch\).*or a method that needs no such batch: .*SoRA",
        lambda: (train(fresh(), ALORA), train(fresh(), SORA, validation_batch=None)),
    ),
    "no labels": Case(
        lambda: train(fresh(), ALORA, validation_batch={"input_ids": token_batch()["input_ids"]}),
        r"Add labels to it, under the name that the model's forward expects, or pass loss_fn",
        lambda: (
            train(fresh(), ALORA),
            train(
                fresh(),
                ALORA,
                validation_batch={"input_ids": token_batch()["input_ids"]},
                loss_fn=lambda model, batch: model(**batch, labels=batch["input_ids"]).loss,
            ),
        ),
    ),
    "a loss without a graph": Case(
        lambda: train(fresh(), ALORA, loss_fn=losing),
        r"Compute it without torch\.no_grad\(\)",
        lambda: train(fresh(), ALORA, loss_fn=keeping),
    ),
    "no steps": Case(lambda: train(fresh(), total_steps=0), r"at least 1", lambda: train(fresh(), total_steps=8)),
}


def dora_over_torchao() -> PeftModel:
    model = adapted(torchao8(), use_dora=True)
    lorank.lora.prevent_repacking(model)
    return model


def over_quanto() -> PeftModel:
    model = adapted(quanto())
    lorank.lora.prevent_repacking(model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_works(name: str) -> None:
    case = CASES[name]
    with pytest.raises((LorankError, ValueError), match=case.message):
        case.mistake()
    case.remedy()


# The Trainer.


def run_trainer(folder: Path, collator: Callable[[Any], Any] | None = None, **callback: Any) -> None:
    rows = [{key: value[0] for key, value in token_batch(1, seed=seed).items()} for seed in range(8)]
    method = callback.pop("method", ALORA)
    trainer = Trainer(
        fresh(),
        TrainingArguments(str(folder), max_steps=4, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True),
        train_dataset=rows,
        **({} if collator is None else {"data_collator": collator}),
        callbacks=[lorank.RankCallback(method, **callback)],
    )
    trainer.train()


def as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collator of trainers of reinforcement learning."""
    return rows


def test_a_trainer_whose_batches_have_no_loss(tmp_path: Path) -> None:
    with pytest.raises(LorankError, match=r"give validation_batch=… .*or a method that needs no such batch: .*SoRA"):
        run_trainer(tmp_path, as_they_are)
    run_trainer(tmp_path, validation_batch=token_batch())
    run_trainer(tmp_path, method=SORA)


def test_a_streamed_validation_set(tmp_path: Path) -> None:
    from datasets import IterableDataset

    def rows() -> Any:
        for seed in range(4):
            yield {key: value[0].tolist() for key, value in token_batch(1, seed=seed).items()}

    stream = IterableDataset.from_generator(rows)
    with pytest.raises(LorankError, match=r"collect the rows first: validation_batch=list\(dataset\.take\(32\)\)"):
        run_trainer(tmp_path, validation_batch=stream)
    run_trainer(tmp_path, validation_batch=list(stream.take(32)))
