"""The loss that ranks are scored by: which cross-entropy it is, when the reference must run, and batches that fail."""

import pytest
import torch
from torch.nn import functional as F

from lorank.errors import AdapterError, ValidationBatchError
from lorank.lora import find_layers
from lorank.scoring import ablation_scores
from lorank.scoring.ablation_variants import IncompatibleError
from lorank.scoring.targets import Targets, find_form
from tests.models import adapted, class_batch, tiny_bert, tiny_llama, token_batch


@pytest.fixture
def llama():
    model = adapted(tiny_llama(), r=1)
    return model, find_layers(model)


# Forms


@pytest.mark.parametrize("form", ["shifted", "unshifted"])
def test_the_form_is_the_one_that_gives_the_models_loss(form) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    labels[0, :2] = -100
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = shifted if form == "shifted" else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert find_form(logits, labels, loss) == form
    targets = Targets.of(form, labels)
    assert targets.count == (11 if form == "shifted" else 13)
    sums = targets.cross_entropy(targets.select(torch.cat([logits, 2 * logits]), 2))  # two variants
    assert float(sums[0]) / targets.count == pytest.approx(float(loss), rel=1e-6)
    alone = targets.cross_entropy(targets.select(2 * logits, 1))
    assert float(sums[1]) == pytest.approx(float(alone[0]))


@pytest.mark.parametrize(
    ("logits", "labels", "loss"),
    [
        (torch.randn(3, 5, 7), torch.zeros(3, 5, dtype=torch.long), 123.0),
        (torch.randn(3, 1), torch.rand(3), 0.1),
        (torch.randn(3, 2), torch.rand(3, 2), 0.1),
        (torch.randn(3, 5, 7), torch.zeros(3, 6, dtype=torch.long), 1.0),
        (None, torch.zeros(3, 5, dtype=torch.long), 1.0),
    ],
    ids=["another loss", "regression", "several labels", "other length", "no logits"],
)
def test_another_loss_has_no_form(logits, labels, loss) -> None:
    with pytest.raises(IncompatibleError):
        find_form(logits, labels, torch.tensor(loss))


# Fallback to the reference


def test_regression_is_scored_by_the_reference(caplog) -> None:
    model = adapted(tiny_bert(labels=1), r=1, target_modules=["value"])
    result = ablation_scores(model, find_layers(model), {**class_batch(), "labels": torch.rand(4)})
    assert result.engine == "reference"
    assert "not the mean cross-entropy" in result.notice
    assert caplog.records[0].levelname == "WARNING"
    assert result.evaluations == 5


def test_label_smoothing_is_scored_by_the_reference(llama, monkeypatch) -> None:
    model, layers = llama

    def smoothed(logits, labels, **_):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)

    monkeypatch.setattr(type(model.get_base_model()), "loss_function", property(lambda self: smoothed))
    assert ablation_scores(model, layers, token_batch()).engine == "reference"


def test_a_loss_function_of_ones_own_is_scored_by_the_reference(llama) -> None:
    model, layers = llama

    def last_token_only(model, batch):
        return F.cross_entropy(model(input_ids=batch["tokens"]).logits[:, -1].float(), batch["answers"])

    tokens = token_batch()["input_ids"]
    batch = {"tokens": tokens, "answers": tokens[:, 0], "note": "not a tensor"}
    result = ablation_scores(model, layers, batch, loss_fn=last_token_only)
    assert result.engine == "reference"
    assert "loss_fn" in result.notice
    assert ablation_scores(model, layers, batch, loss_fn=last_token_only, engine="reference").notice is None


def test_a_loss_from_other_labels_is_scored_by_the_reference() -> None:
    from transformers import BertForQuestionAnswering

    model = adapted(BertForQuestionAnswering(tiny_bert(labels=2).config), r=1, target_modules=["value"])
    tokens = token_batch()["input_ids"]
    batch = {"input_ids": tokens, "start_positions": torch.ones(4).long(), "end_positions": torch.ones(4).long()}
    assert ablation_scores(model, find_layers(model), batch).engine == "reference"


# Batches that fail


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "is a list; expected a mapping"),
        ({}, "is empty"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"shape \(0, 4\): there is no sample"),
        ({"input_ids": [[1, 2]]}, "'input_ids' is a list; expected a tensor"),
        ({"input_ids": torch.ones(2, 4).long()}, "returned no loss .* Add labels"),
        ({"input_ids": torch.ones(2, 4).long(), "labels": torch.full((2, 4), -100)}, "all 8 labels .* are -100"),
    ],
    ids=["no mapping", "empty", "no samples", "no tensor", "no labels", "all ignored"],
)
@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_a_bad_batch_says_what_to_do(llama, engine, batch, message) -> None:
    with pytest.raises(ValidationBatchError, match=message):
        ablation_scores(*llama, batch, engine=engine)


def test_a_label_that_only_the_shift_removes(llama) -> None:
    batch = token_batch()
    batch["labels"][:, 1:] = -100
    with pytest.raises(ValidationBatchError, match="loss of the model on the validation batch is nan"):
        ablation_scores(*llama, batch)


@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_a_model_that_diverged(llama, engine) -> None:
    model, layers = llama
    list(layers.values())[-1].B.data[0, 0] = float("nan")  # some kernels of attention swallow one in a query
    with pytest.raises(ValidationBatchError, match="loss of the model on the validation batch is nan"):
        ablation_scores(model, layers, token_batch(), engine=engine)


@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_a_variant_that_is_not_finite_is_named(llama, engine) -> None:
    model, layers = llama
    name = list(layers)[-1]
    forward = layers[name].module.forward

    def overflows_alone(x):
        others_off = all(layer.gate is not None for layer in layers.values())
        return forward(x) * (float("inf") if others_off and bool((layers[name].gate != 0).all()) else 1.0)

    layers[name].module.forward = overflows_alone
    with pytest.raises(ValidationBatchError, match=f"loss of rank 0 of {name} alone .* is nan"):
        ablation_scores(model, layers, token_batch(), engine=engine)


def test_a_loss_that_is_not_one_number(llama) -> None:
    with pytest.raises(ValidationBatchError, match=r"loss_fn returned a loss of shape \(4,\)"):
        ablation_scores(*llama, token_batch(), loss_fn=lambda model, batch: torch.ones(4))
    with pytest.raises(ValidationBatchError, match="loss_fn returned a loss of float"):
        ablation_scores(*llama, token_batch(), loss_fn=lambda model, batch: 1.0)


def test_a_gate_per_sample_is_refused(llama) -> None:
    model, layers = llama
    next(iter(layers.values())).gate = torch.ones(4, 1)
    with pytest.raises(AdapterError, match="gate per sample"):
        ablation_scores(model, layers, token_batch())


@pytest.mark.parametrize("option", [{"terms": "all"}, {"engine": "fast"}, {"max_rows": 0}])
def test_unknown_options(llama, option) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*; expected"):
        ablation_scores(*llama, token_batch(), **option)
