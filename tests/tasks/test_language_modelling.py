"""Language modelling: packing, parts and perplexity."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.tasks import DataError, LanguageModellingSettings, LanguageModellingTask, pack


def test_packing_joins_texts_and_drops_the_rest(tokenizer: Any) -> None:
    blocks = pack(["good film", "bad plot very bad"], tokenizer, block_size=4)
    words = [tokenizer.convert_ids_to_tokens(block["input_ids"]) for block in blocks]
    assert words == [["good", "film", "</s>", "bad"], ["plot", "very", "bad", "</s>"]]
    assert all(block["labels"] == block["input_ids"] for block in blocks)
    assert len(pack(["good film", "bad"], tokenizer, block_size=4)) == 1


def test_a_text_file_is_held_out_by_paragraph(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(["good film and very bad plot"] * 30))
    settings = LanguageModellingSettings(
        data=str(tmp_path / "notes.txt"), holdout=0.2, test_split=None, block_size=8, max_train=5
    )
    task = LanguageModellingTask(settings, tokenizer)
    assert len(task.train) == 5
    assert len(task.validation) == 6 * 7 // 8
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    figures = task.evaluate(model, "validation", progress=False)
    batch = task.collator(task.validation)
    with torch.no_grad():
        loss = model.eval()(**batch).loss.item()
    assert figures == {"loss": pytest.approx(loss, abs=1e-5), "perplexity": pytest.approx(math.exp(loss), rel=1e-5)}


def test_python_reference_needs_nothing_from_outside(tokenizer: Any) -> None:
    task = LanguageModellingTask(LanguageModellingSettings(data="python_reference", block_size=64), tokenizer)
    assert len(task.train) > len(task.test) > 0


def test_too_little_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "notes.txt").write_text("good\n\nbad")
    settings = LanguageModellingSettings(data=str(tmp_path / "notes.txt"), holdout=0.5, test_split=None)
    with pytest.raises(DataError, match="does not fill one block of 256"):
        LanguageModellingTask(settings, tokenizer)
