"""Lightning itself: its wrapper and closures, accumulation, and a checkpoint in the middle of moving ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lorank
from tests.methods import METHODS
from tests.models import adapted, tiny_llama, token_batch

lightning = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning, about few workers and a missing logger
STEPS, BATCHES = 12, 6


class Module(lightning.LightningModule):
    """As docs/loops.md has it: the run is attached before ``trainer.fit``."""

    def __init__(self, method: str, accumulate: int = 1) -> None:
        super().__init__()
        self.accumulate = accumulate
        self.model = adapted(tiny_llama(1), random_B=False)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.ranks = lorank.attach(
            self.model,
            self.optimizer,
            METHODS[method].make(),
            validation_batch=token_batch(seed=99),
            total_steps=STEPS,
        )
        self.losses: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def training_step(self, _: Any, index: int) -> Tensor:
        # Lightning repeats a batch when it resumes, so the data come from the count of steps.
        batch = token_batch(seed=self.ranks.step * self.accumulate + index % self.accumulate)
        loss: Tensor = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss


def fit(method: str, folder: Path, *, steps: int = STEPS, accumulate: int = 1, resume: Path | None = None) -> Module:
    module = Module(method, accumulate)
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(
        module, DataLoader(range(BATCHES)), ckpt_path=None if resume is None else str(resume), weights_only=False
    )
    trainer.save_checkpoint(folder / "checkpoint.ckpt")
    return module


def by_hand(method: str, accumulate: int) -> tuple[lorank.Ranks, list[float]]:
    """The same run in a plain loop."""
    module = Module(method, accumulate)
    module.train()
    for index in range(STEPS * accumulate):
        (module.training_step(None, index) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            module.optimizer.step()
            module.optimizer.zero_grad()
    return module.ranks, module.losses


def assert_same(ranks: lorank.Ranks, expected: lorank.Ranks) -> None:
    assert ranks.finished
    assert ranks.layers.ranks == expected.layers.ranks
    assert len({tuple(record.ranks.values()) for record in ranks.history}) > 1
    for name, layer in ranks.layers.items():
        assert torch.equal(layer.A, expected.layers[name].A)
        assert torch.equal(layer.B, expected.layers[name].B)


@pytest.mark.parametrize(("method", "accumulate"), [("balanced", 2), ("ard-heads", 1)])
def test_lightning_gives_what_a_plain_loop_gives(method: str, accumulate: int, tmp_path: Path) -> None:
    module = fit(method, tmp_path, accumulate=accumulate)
    expected, losses = by_hand(method, accumulate)
    assert module.losses == losses
    assert_same(module.ranks, expected)


def test_a_run_goes_on_exactly_from_lightnings_checkpoint(tmp_path: Path) -> None:
    """Stopped when ranks have moved and will move again: the checkpoint has other ranks than a new module."""
    half = fit("alora-first-order", tmp_path, steps=BATCHES)
    assert half.ranks.layers.ranks != Module("alora-first-order").ranks.layers.ranks
    resumed = fit("alora-first-order", tmp_path / "resumed", resume=tmp_path / "checkpoint.ckpt")
    expected, losses = by_hand("alora-first-order", 1)
    assert resumed.losses == losses[BATCHES:]
    assert_same(resumed.ranks, expected)


def test_attaching_when_training_begins(tmp_path: Path) -> None:
    """For a run that will not be resumed: in a hook, on the optimiser inside Lightning's."""

    class Late(Module):
        def __init__(self) -> None:
            super().__init__("alora")
            self.ranks.detach()
            self.ranks: Any = None

        def on_train_start(self) -> None:
            self.ranks = lorank.attach(
                self.model,
                self.optimizers().optimizer,
                lorank.SoRA(prune_every=2),
                total_steps=self.trainer.max_steps,
            )

    module = Late()
    lightning.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, DataLoader(range(STEPS)))
    assert module.ranks.finished
    assert module.ranks.step == STEPS
