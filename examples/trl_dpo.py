"""Rank allocation in TRL's DPOTrainer; needs `pip install "lorank[trl]"`.

python examples/trl_dpo.py

The reference model is the trained model with its adapter switched off, so there is no second model in memory. A
preference batch has no labels, and `model(**batch)` gives no loss. So RankCallback is told to use the trainer's own.
"""

from __future__ import annotations

from importlib.resources import files
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import lorank

TINY = str(files("lorank") / "assets" / "tiny_llama")


def preferences(count: int, length: int) -> Dataset:
    """A sentence of Python's manual is preferred to the same sentence backwards: toy data, but a loss that falls."""
    rows = []
    for text in list(topics.values())[:count]:
        words = text.split()[:length]
        rows.append(
            {
                "prompt": " ".join(words[: length // 3]),
                "chosen": " " + " ".join(words[length // 3 :]),
                "rejected": " " + " ".join(reversed(words[length // 3 :])),
            }
        )
    return Dataset.from_list(rows)


def main(
    steps: int = 30, rows: int = 64, length: int = 48, logging_steps: int = 10, output: str = "dpo-adapter"
) -> lorank.RankCallback:
    ranks = lorank.RankCallback(
        lorank.BalancedLoRA(),
        loss_fn=lambda model, batch: trainer.compute_loss(model, dict(batch)),
    )
    trainer = DPOTrainer(
        model=TINY,
        ref_model=None,  # with a PEFT model: the same model without its adapter
        args=DPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            bf16=False,
            logging_steps=logging_steps,
            save_steps=steps,
            report_to=[],
        ),
        train_dataset=preferences(rows, length),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[ranks],
    )
    trainer.train()
    ranks.ranks.save_adapter(f"{output}/adapter")
    return ranks


if __name__ == "__main__":
    main()
