"""The adapted model is a part of a larger model: it is found, scored by the whole model, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lorank
from lorank.errors import AdapterError
from lorank.lora import find_layers, make_peft_model
from lorank.testing import plain_peft
from tests.methods import METHODS, STEPS
from tests.models import tiny_llama, token_batch
from tests.training.loops import adamw
from tests.training.trainer_run import rows

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


class Headed(nn.Module):
    """An encoder with an adapter, and a trained head: its loss is another than the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        torch.manual_seed(3)
        self.head = nn.Linear(64, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Any]:
        y = self.head(self.encoder(input_ids=input_ids).logits.mean(1))  # (n, 3)
        loss = None if labels is None else nn.functional.cross_entropy(y, labels[:, 0] % 3)
        return {"loss": loss, "logits": y}


def arguments_of(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=7,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )


def trainer_of(folder: Path, trained: nn.Module, method: str, **options: Any) -> Trainer:
    callback = lorank.RankCallback(METHODS[method].make(), validation_batch=token_batch(seed=9), **options)
    settings = arguments_of(folder)
    return Trainer(trained, settings, train_dataset=rows(8, seed=0), callbacks=[callback])


@pytest.mark.parametrize("method", ["sora", "adalora", "alora", "ard-heads", "balanced"])
def test_a_trainers_run_of_a_larger_model_is_saved_and_resumed_bitwise(method: str, tmp_path: Path) -> None:
    model = Headed()
    trainer_of(tmp_path, model, method).train()
    layers = find_layers(model)
    assert len(set(layers.ranks.values())) > 1
    resumed = Headed()
    trainer_of(tmp_path, resumed, method).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert find_layers(resumed).ranks == layers.ranks
    expected, found = model.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    # In a process without lorank, the adapter belongs to the inner model.
    lorank.save_adapter(layers, tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    batch = {"input_ids": token_batch(seed=5)["input_ids"]}
    with torch.no_grad():
        logits = model.encoder.eval()(**batch).logits
    for reloaded in plain_peft().logits(tmp_path / "base", tmp_path / "adapter", batch).values():
        assert (reloaded - logits).abs().max() <= 1e-6 * logits.abs().max()


def test_ranks_are_scored_by_the_larger_model() -> None:
    records = []
    for inner in (False, True):
        model = Headed()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for layer in find_layers(model).values():
            layer.B.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.2)
        ranks = lorank.attach(
            model.encoder if inner else model,
            optimizer,
            METHODS["alora"].make(),
            validation_batch=token_batch(seed=9),
            loss_fn=(lambda _, batch, whole=model: whole(**batch)["loss"]) if inner else None,
            total_steps=4,
        )
        with torch.no_grad():
            loss = float(model.eval()(**token_batch(seed=9))["loss"])
        for _ in range(3):
            model(**token_batch(seed=0))["loss"].backward()
            optimizer.step()
        records.append(ranks.history[1])
        assert records[-1].details["loss"] == pytest.approx(loss, rel=1e-6)
    for name, scores in records[1].scores.items():
        assert records[0].scores[name] == pytest.approx(scores, rel=1e-4, abs=1e-7)


def test_one_of_two_adapted_models_is_chosen_with_model(tmp_path: Path) -> None:
    class Two(Headed):
        def __init__(self) -> None:
            super().__init__()
            self.other = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))

        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Any]:
            y = self.head((self.encoder(input_ids=input_ids).logits * self.other(input_ids=input_ids).logits).mean(1))
            return {"loss": nn.functional.cross_entropy(y, labels[:, 0] % 3), "logits": y}

    model = Two()
    with pytest.raises(AdapterError, match=r"encoder \(PeftModel\), other \(PeftModel\).*model=model\.encoder"):
        trainer_of(tmp_path, model, "alora")
    trainer_of(tmp_path, model, "alora", model=model.other).train()
    assert set(find_layers(model.encoder).ranks.values()) == {4}
    assert len(set(find_layers(model.other).ranks.values())) > 1
    # One run for each, with an optimiser of its own.
    runs = []
    for inner in (model.encoder, model.other):
        optimizer = adamw(inner)
        whole = {"loss_fn": lambda _, batch: model(**batch)["loss"], "validation_batch": token_batch(seed=9)}
        runs.append((lorank.attach(inner, optimizer, METHODS["sora"].make(), total_steps=STEPS, **whole), optimizer))
    for seed in range(STEPS):
        model(**token_batch(seed=seed))["loss"].backward()
        for _, optimizer in runs:
            optimizer.step()
            optimizer.zero_grad()
    assert [ranks.layers.total_rank for ranks, _ in runs] == [28, 28]


class Embedder(nn.Module):
    """The first module of a Sentence Transformer: it holds a transformers model, to which an adapter is added."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = tiny_llama()

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens = self.auto_model(input_ids=features["input_ids"], output_hidden_states=True).hidden_states[-1]
        return {**features, "token_embeddings": tokens}


class Pooling(nn.Module):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "sentence_embedding": features["token_embeddings"].mean(1)}


class SentenceModel(nn.Sequential):
    """The structure of a Sentence Transformer, and how its trainer saves and loads it."""

    def __init__(self) -> None:
        super().__init__(Embedder(), Pooling())

    def save_pretrained(self, folder: str, **_: Any) -> None:
        self[0].auto_model.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str) -> SentenceModel:
        with torch.random.fork_rng():  # the tiny model is made with a seed, and the order of the data must not change
            model = cls()
            model[0].auto_model.load_adapter(folder)
        return model


class SentenceTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        a, b = (model({"input_ids": ids})["sentence_embedding"] for ids in inputs["input_ids"].split(5, dim=1))
        similarities = a @ b.T  # (n, n)
        return nn.functional.cross_entropy(similarities, torch.arange(len(a)))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        self.model.load_state_dict(SentenceModel.load(checkpoint).state_dict())


@pytest.mark.parametrize("method", ["sora", "adalora", "ard-heads"])
def test_a_sentence_transformers_adapter(method: str, tmp_path: Path) -> None:
    """The Trainer's model is a Sequential without labels or loss; checkpoints hold the inner model's adapter."""

    def make() -> SentenceTrainer:
        model = SentenceModel()
        model[0].auto_model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]))
        callback = lorank.RankCallback(METHODS[method].make())
        arguments = arguments_of(tmp_path, remove_unused_columns=False)
        return SentenceTrainer(model, arguments, train_dataset=rows(8, seed=0), callbacks=[callback])

    straight, resumed = make(), make()
    straight.train()
    layers = find_layers(straight.model)
    assert len(set(layers.ranks.values())) > 1
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    expected, found = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    batch = {"input_ids": token_batch(seed=5)["input_ids"]}
    last = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"checkpoint-{STEPS}").eval()
    with torch.no_grad():
        assert torch.allclose(last(**batch).logits, straight.model[0].auto_model.eval()(**batch).logits, atol=1e-6)


@pytest.mark.parametrize("inner", ["base model", "tuner"])
def test_an_adapter_of_a_model_inside_a_peft_model_is_saved_in_plain_form(inner: str, tmp_path: Path) -> None:
    model = make_peft_model(tiny_llama(), r=4, target_modules="all-linear")
    optimizer = adamw(model)
    given = model.get_base_model() if inner == "base model" else model.base_model
    ranks = lorank.attach(given, optimizer, METHODS["sora"].make(), total_steps=STEPS)
    for seed in range(STEPS):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks.save_adapter(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        logits = model.eval()(**token_batch(seed=5)).logits
    for reloaded in plain_peft().logits(tmp_path / "base", tmp_path / "adapter", token_batch(seed=5)).values():
        assert (reloaded - logits).abs().max() <= 1e-6 * logits.abs().max()


def test_a_model_that_the_trainer_does_not_train_is_refused(tmp_path: Path) -> None:
    other = make_peft_model(tiny_llama(), r=4, target_modules="all-linear")
    with pytest.raises(AdapterError, match="not a part of the Headed"):
        trainer_of(tmp_path, Headed(), "sora", model=other).train()
