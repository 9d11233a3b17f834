"""Rank allocation in TRL's SFTTrainer; needs `pip install "lorank[trl]"`.

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


def main(steps: int = 60, length: int = 128, output: str = "sft-adapter") -> lorank.RankCallback:
    rows = Dataset.from_list([{"text": text[:800]} for text in topics.values()])
    ranks = lorank.RankCallback(lorank.BalancedLoRA())  # the only line for lorank, and its use in callbacks
    trainer = SFTTrainer(
        model=TINY,
        args=SFTConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_length=length,
            bf16=False,
            logging_steps=10,
            save_steps=steps,
            report_to=[],
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[ranks],
    )
    trainer.train()
    ranks.ranks.save_adapter(f"{output}/adapter", about={"Data": "Python's reference manual"})
    print({name: rank for name, rank in ranks.ranks.layers.ranks.items() if rank != 4})
    return ranks


if __name__ == "__main__":
    main()
