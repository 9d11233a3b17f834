"""TRL's GRPO: its rows give no loss, so a method that needs no batch allocates, and any other stops with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig

import lorank
from tests.models import tiny_llama
from tests.training.test_trainer_callback import word_tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def grpo(folder: Path, method: lorank.Allocator) -> lorank.RankCallback:
    from datasets import Dataset

    def reward(completions: list[str], **_: object) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    callback = lorank.RankCallback(method)
    trainer = trl.GRPOTrainer(
        model=tiny_llama(),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(folder),
            max_steps=10,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            learning_rate=1e-2,
            beta=0.04,  # a reference model: the trained one, with its adapter switched off
            logging_steps=1,
            save_steps=10,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(16)]),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    return callback


def test_balanced_lora_without_a_gradient_start_allocates_in_grpo(tmp_path: Path) -> None:
    callback = grpo(tmp_path, lorank.BalancedLoRA(init="default"))
    assert [record.step for record in callback.ranks.history.allocations] == [1, 2, 3]
    assert len(set(callback.ranks.layers.ranks.values())) > 1
    log = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    divergences = [entry["kl"] for entry in log if "kl" in entry]
    assert divergences[0] == pytest.approx(0, abs=1e-6)  # the model begins at its reference
    assert divergences[-1] > 0


def test_with_a_gradient_start_it_stops_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(lorank.ValidationBatchError, match="not a batch with which model") as error:
        grpo(tmp_path, lorank.BalancedLoRA())
    assert "train_batches" in str(error.value)
