"""TRL's SFT with packed rows: several texts in one row, told apart by their positions. Scores are of those rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import lorank
from lorank.scoring import ablation_scores
from tests.models import tiny_llama
from tests.training.test_trainer_callback import word_tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL: packing without flash attention lets texts see each other


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_train_and_are_scored_exactly(strategy: str, tmp_path: Path) -> None:
    from datasets import Dataset

    texts = Dataset.from_list([{"text": " ".join(f"w{(i * j) % 60}" for j in range(1, 6 + i % 7))} for i in range(48)])
    callback = lorank.RankCallback(
        lorank.ALoRA(k1=2, k2=1, rounds=2, unit="steps", per_round=6),
        validation_batch=lambda: trainer.train_dataset,
        samples=4,
    )
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=3e-2,
            packing=True,
            packing_strategy=strategy,
            max_length=16,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=texts,
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.ranks.history[0].ranks != callback.ranks.layers.ranks
    batch = next(iter(trainer.get_train_dataloader()))
    if strategy == "bfd":
        assert (batch["position_ids"] == 0).sum() > 1, "only one text in a row"
    model, layers = trainer.model.eval(), callback.ranks.layers
    fast = ablation_scores(model, layers, dict(batch))
    slow = ablation_scores(model, layers, dict(batch), engine="reference")
    assert max(float(scores.abs().max()) for scores in slow.scores.values()) > 1e-4
    for name, scores in slow.scores.items():
        torch.testing.assert_close(fast.scores[name], scores, rtol=0, atol=1e-5)
