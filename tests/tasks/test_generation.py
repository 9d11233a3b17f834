"""Generation: labels on the target alone, references grouped by prompt, metrics against the libraries' own."""

import logging
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.tasks import DataError, GenerationSettings, GenerationTask, text_scores
from lorank.tasks.collate import IGNORED

PROMPTS = ["name Alimentum", "food Indian", "area centre", "food Indian , area centre", "name Alimentum , food Indian"]
ROWS = [
    {"meaning": prompt, "reference": reference}
    for prompt in PROMPTS
    for reference in (f"{prompt} .", f"a restaurant in the {prompt} .", f"the food is {prompt} .")
]


@pytest.fixture
def settings(tmp_path: Path, write_rows: Any) -> GenerationSettings:
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "test.jsonl", ROWS)
    return GenerationSettings(
        data=str(tmp_path), prompt="{meaning} :", target="{reference}", holdout=0.4, max_new_tokens=6
    )


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    return LlamaForCausalLM(config)


def prompts_of(tokenizer: Any, examples: Any) -> set[str]:
    return {
        tokenizer.decode([t for t, label in zip(e["input_ids"], e["labels"], strict=True) if label == IGNORED])
        for e in examples
    }


def test_only_the_target_and_its_end_carry_labels(settings: GenerationSettings, tokenizer: Any) -> None:
    task = GenerationTask(settings, tokenizer)
    for example in [*task.train, *task.validation]:
        labelled = [t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]
        assert labelled == [label for label in example["labels"] if label != IGNORED]
        assert labelled[-1] == tokenizer.eos_token_id
        prompt = tokenizer.decode(example["input_ids"][: -len(labelled)])
        assert prompt.startswith("<s>")
        assert prompt.endswith(":")


def test_no_prompt_is_both_trained_on_and_held_out(settings: GenerationSettings, tokenizer: Any) -> None:
    task = GenerationTask(settings, tokenizer)
    train, validation = prompts_of(tokenizer, task.train), prompts_of(tokenizer, task.validation)
    assert not train & validation
    assert len(train | validation) == len(PROMPTS)
    # three references each
    assert len(task.train) == 3 * len(train)
    assert len(task.validation) == 3 * len(validation)


def test_the_same_seed_gives_the_same_parts(settings: GenerationSettings, tokenizer: Any) -> None:
    first, again = GenerationTask(settings, tokenizer), GenerationTask(settings, tokenizer)
    assert first.train == again.train
    assert first.validation == again.validation
    parts = {
        frozenset(prompts_of(tokenizer, GenerationTask(settings.model_copy(update={"seed": s}), tokenizer).validation))
        for s in range(5)
    }
    assert len(parts) > 1


def test_limits_count_examples_for_training_and_prompts_for_evaluation(
    settings: GenerationSettings, tokenizer: Any
) -> None:
    task = GenerationTask(settings.model_copy(update={"max_train": 4, "max_eval": 1}), tokenizer)
    assert (len(task.train), len(task.validation), len(task.test)) == (4, 3, 3)


def test_what_is_too_long_is_cut_in_the_prompt_first(
    settings: GenerationSettings, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        task = GenerationTask(settings.model_copy(update={"max_length": 4}), tokenizer)
    assert "were truncated" in caplog.text
    for example in task.train:
        assert len(example["input_ids"]) <= 4
        assert example["labels"][0] == IGNORED
        assert example["labels"][-1] != IGNORED


def test_the_loss_does_not_depend_on_batches(settings: GenerationSettings, tokenizer: Any, model: Any) -> None:
    task = GenerationTask(settings, tokenizer)
    one = task.evaluate(model, "validation", batch_size=1, progress=False)
    many = task.evaluate(model, "validation", batch_size=4, progress=False)
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-6)
    assert set(many) == {"loss", "bleu", "rouge_l"}
    # and it is the mean over tokens, not over batches
    total, count = 0.0, 0
    for example in task.validation:
        tokens, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        logits = model(input_ids=tokens).logits[:, :-1]  # (1, length − 1, vocabulary)
        total += torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != IGNORED).sum())
    assert one["loss"] == pytest.approx(total / count, abs=1e-5)


def test_texts_come_in_the_order_of_their_prompts(settings: GenerationSettings, tokenizer: Any, model: Any) -> None:
    task = GenerationTask(settings, tokenizer)
    alone = [task.generate(model, [prompt], progress=False)[0] for prompt in PROMPTS]
    assert task.generate(model, PROMPTS, batch_size=2, progress=False) == alone
    assert len(set(alone)) > 1


def test_beams_are_searched(settings: GenerationSettings, tokenizer: Any, model: Any) -> None:
    greedy = GenerationTask(settings, tokenizer).generate(model, PROMPTS, progress=False)
    beams = GenerationTask(settings.model_copy(update={"num_beams": 4}), tokenizer)
    assert beams.generate(model, PROMPTS, progress=False) != greedy


def test_scores_are_those_of_the_libraries() -> None:
    texts = ["the cat sat on the mat today", "a dog barks at the moon"]
    references = [["the cat sat on a mat today", "a cat sat on the mat"], ["the dog barks at the moon"]]
    scores = text_scores(texts, references)
    # sacrebleu with every item given equally many references by repeating one: the same counts
    padded = [[r[0] for r in references], [r[-1] for r in references]]
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, padded).score)
    rouge = RougeScorer(["rougeL"])
    best = [max(rouge.score(r, t)["rougeL"].fmeasure for r in rs) for rs, t in zip(references, texts, strict=True)]
    assert scores["rouge_l"] == pytest.approx(100 * sum(best) / 2)


def test_a_perfect_text_scores_a_hundred() -> None:
    assert text_scores(["the cat sat on the mat"], [["a dog", "the cat sat on the mat"]]) == {
        "bleu": pytest.approx(100),
        "rouge_l": pytest.approx(100),
    }


def test_a_tokenizer_that_cannot_stop_is_refused(settings: GenerationSettings, tokenizer: Any) -> None:
    from copy import deepcopy

    endless = deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="never stop"):
        GenerationTask(settings, endless)


def test_an_absent_column_is_named(settings: GenerationSettings, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no column 'summary'.*'meaning', 'reference'"):
        GenerationTask(settings.model_copy(update={"target": "{summary}"}), tokenizer)
