"""Image classification: scikit-learn's digits, what scrambling does, batches, accuracy against a count by hand."""

from __future__ import annotations

import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from lorank.extras import MissingPackageError
from lorank.tasks import DataError, ImageClassificationSettings, ImageClassificationTask, build_task, load_rows
from lorank.tasks.image_classification import scramble
from tests.tasks.one_at_a_time import check_metrics

SPLITS = ("train", "validation", "test")


def settings(**changes: object) -> ImageClassificationSettings:
    return ImageClassificationSettings.model_validate({"data": "digits", **changes})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def test_the_splits_are_disjoint_and_hold_every_image() -> None:
    from sklearn.datasets import load_digits

    parts = [load_rows("digits", split) for split in SPLITS]
    assert [len(part) for part in parts] == [997, 400, 400]
    found = sorted((row["label"], row["image"]) for part in parts for row in part)
    data = load_digits()
    assert found == sorted(zip(data.target.tolist(), data.images.tolist(), strict=True))
    with pytest.raises(DataError, match="train, validation, test, not 'dev'"):
        load_rows("digits", "dev")


def test_examples_are_the_images() -> None:
    task = build_task(settings(), None)
    assert task.label_names == tuple("0123456789")
    rows = [row for split in SPLITS for row in load_rows("digits", split)]
    inked = {(torch.tensor(row["image"]).sum().item(), row["label"]) for row in rows}
    assert all(
        (((example["pixel_values"] + 1) * 8).sum().item(), example["labels"]) in inked
        for example in [*task.train, *task.validation, *task.test]
    )
    batch = task.collator(task.validation[:5])
    assert batch["pixel_values"].shape == (5, 1, 8, 8)
    assert (batch["pixel_values"].min(), batch["pixel_values"].max()) == (-1, 1)
    assert batch["labels"].tolist() == [example["labels"] for example in task.validation[:5]]
    assert len({example["labels"] for example in task.validation[:32]}) >= 8


def test_limits() -> None:
    task = ImageClassificationTask(settings(max_train=5, max_eval=3))
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 3, 3)
    held = ImageClassificationTask(settings(holdout=0.25, test_split=None))
    assert (len(held.train), len(held.validation), held.has_test) == (747, 250, False)


def test_images_are_resized_and_have_the_channels_of_the_model() -> None:
    task = ImageClassificationTask(settings(image_size=16, channels=3, max_train=2))
    images = task.collator(task.train)["pixel_values"]
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])
    small = torch.stack([example["pixel_values"] for example in task.train])
    assert torch.equal(images[:, 0, 0, 0], small[:, 0, 0, 0])  # the corner stays where it is
    assert images.mean() == pytest.approx(small.mean().item(), abs=0.05)


def test_scrambling_moves_the_share_of_the_pixels_alike_in_all_images() -> None:
    places = torch.arange(64.0).view(1, 8, 8)
    images = torch.cat([places, places + 100])
    assert torch.equal(scramble(images, 0), images)
    half, all_ = scramble(images, 0.5), scramble(images, 1)
    assert torch.equal(half[1], half[0] + 100)
    assert (half[0] != places[0]).sum() == 32
    assert (all_[0] != places[0]).sum() == 64
    assert torch.equal(all_[0].flatten().sort().values, places.flatten())
    moved = half[0] != places[0]
    assert (scramble(images, 0.25)[0] != places[0])[~moved].sum() == 0, "a smaller share moves nothing else"


def test_a_scrambled_task_is_the_same_task_with_other_pixels() -> None:
    plain, moved = ImageClassificationTask(settings()), ImageClassificationTask(settings(scramble=1.0))
    for one, other in zip(plain.validation, moved.validation, strict=True):
        assert one["labels"] == other["labels"]
        assert not torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(*(example["pixel_values"].flatten().sort().values for example in (one, other)))


def test_accuracy_and_loss_agree_with_one_example_at_a_time(model: nn.Module) -> None:
    task = ImageClassificationTask(settings(max_eval=10))
    check_metrics(task, model)


def test_other_data_are_refused_and_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="'digits'"):
        settings(data="mnist")
    monkeypatch.setitem(sys.modules, "sklearn", None)  # type: ignore[arg-type]  # None: there is no such module
    with pytest.raises(MissingPackageError, match=r"'digits' needs the package scikit-learn: .*\[images\]"):
        ImageClassificationTask(settings())


def test_a_task_of_texts_needs_a_tokenizer() -> None:
    from lorank.tasks import LanguageModellingSettings

    with pytest.raises(DataError, match="language_modelling needs a tokenizer"):
        build_task(LanguageModellingSettings(data="python_reference"), None)
