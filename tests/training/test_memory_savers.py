"""What saves memory changes no number: accumulation, checkpointing, activations on the CPU; and noise goes its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lorank
from tests.methods import METHODS, STEPS, WITH_DORA, Method
from tests.models import adapted, tiny_llama, token_batch

SAVED = {name: method for name, method in WITH_DORA.items() if name != "alora-retry"}  # a setting of ALoRA's


def checkpointed(reentrant: bool) -> Callable[[PeftModel], None]:
    def prepare(model: PeftModel) -> None:
        base = model.base_model.model
        # transformers renamed it on the way to version 6
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    return prepare


def exact_loss(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """transformers' own is computed in float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def run(
    method: Method,
    prepare: Callable[[PeftModel], object] = lambda _: None,
    *,
    parts: int = 1,
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> tuple[lorank.Ranks, list[Tensor]]:
    """Losses of a run in float64, without dropout, and its weights at the end."""
    torch.set_default_dtype(torch.float64)
    try:
        model = adapted(tiny_llama(), random_B=False, **method.lora).double().train()
        prepare(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ranks = lorank.attach(
            model, optimizer, method.make(), validation_batch=token_batch(seed=99), total_steps=STEPS, seed=7
        )
        seen: list[Tensor] = []
        while ranks.step < STEPS:
            batch = token_batch(4, seed=ranks.step)
            loss = torch.zeros(())
            for rows in torch.arange(4).chunk(parts):
                with around():
                    part = exact_loss(model, {key: value[rows] for key, value in batch.items()}) / parts
                    part.backward()
                loss += part.detach()
            seen.append(loss)
            optimizer.step()
            optimizer.zero_grad()
        return ranks, [*seen, *(p.detach() for p in model.parameters() if p.requires_grad)]
    finally:
        torch.set_default_dtype(torch.float32)


def same(one: tuple[lorank.Ranks, list[Tensor]], other: tuple[lorank.Ranks, list[Tensor]], tolerance: float) -> None:
    assert [r.ranks for r in one[0].history] == [r.ranks for r in other[0].history]
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", SAVED.values(), ids=SAVED)
def test_memory_savers(method: Method) -> None:
    plain = run(method)
    same(plain, run(method, parts=2), 1e-7)
    same(plain, run(method, checkpointed(True)), 0)
    same(plain, run(method, checkpointed(False)), 0)
    same(plain, run(method, around=torch.autograd.graph.save_on_cpu), 0)


@pytest.mark.parametrize("name", ["alora", "ard-heads"])
def test_base_weights_on_disk(name: str, tmp_path: Path) -> None:
    """accelerate's offloading hooks the base layers, which keep PEFT's forward then."""

    def offload(model: PeftModel) -> None:
        for full_name, layer in lorank.find_layers(model).items():
            disk_offload(layer.module.get_base_layer(), tmp_path / full_name, torch.device("cpu"))
            assert layer.module.get_base_layer().weight.is_meta

    offloaded = run(METHODS[name], offload)
    same(run(METHODS[name]), offloaded, 1e-7)


@pytest.mark.parametrize("name", ["alora", "alora-dnas"])
def test_with_neftune(name: str, tmp_path: Path) -> None:
    """Noise on the embeddings reaches training and not the scores: two trainers decide alike and end the same."""
    method, ends = METHODS[name], []
    for folder in ("one", "two"):
        torch.manual_seed(0)
        model = adapted(tiny_llama(), random_B=False, **method.lora)
        callback = lorank.RankCallback(method.make(), validation_batch=token_batch(seed=99))
        rows = [{key: value[0] for key, value in token_batch(1, seed=i).items()} for i in range(16)]
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path / folder),
                max_steps=STEPS,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                neftune_noise_alpha=5.0,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
                save_strategy="no",
                gradient_accumulation_steps=2,
            ),
            train_dataset=rows,
            callbacks=[callback],
        )
        trainer.train()
        ends.append(model.state_dict())
    assert callback.ranks is not None
    assert len(callback.ranks.history) > 1 or method is METHODS["static"]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
