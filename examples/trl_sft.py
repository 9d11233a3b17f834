"""Rank allocation in TRL's SFTTrainer; needs `pip install lorank[trl]`.

python examples/trl_sft.py
"""

from __future__ import annotations

from importlib.resources import files
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import lorank

TINY = str(files("lorank") / "assets" / "tiny_llama")


def main(steps: int = 30, samples: int = 32, length: int = 128, output: str = "sft-adapter") -> lorank.RankCallback:
    texts = Dataset.from_list([{"text": text[:800]} for text in topics.values()]).train_test_split(0.2, seed=0)
    ranks = lorank.RankCallback(
        lorank.ALoRA(k1=steps // 3, k2=steps // 3, rounds=2, unit="steps"),
        validation_batch=lambda: trainer.eval_dataset,  # TRL's own tokenised rows
        samples=samples,
    )
    trainer = SFTTrainer(
        model=TINY,
        args=SFTConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            max_length=length,
            bf16=False,
            save_steps=steps,
            report_to=[],
        ),
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[ranks],
    )
    trainer.train()
    print({name: rank for name, rank in ranks.ranks.layers.ranks.items() if rank != 4})
    return ranks


if __name__ == "__main__":
    main()
