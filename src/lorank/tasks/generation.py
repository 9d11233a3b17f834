"""Text generation from a prompt: loss on the target only, BLEU (Papineni et al. 2002) and ROUGE-L (Lin 2004).

A prompt may have several references (E2E has about eight per meaning representation). One text is generated for it and
compared with all of its references. BLEU is sacrebleu's corpus BLEU with its own tokenisation (13a), case-sensitive. It
is not the E2E challenge's script, so compare it with other lorank runs, not with published results. ROUGE-L is the
F-measure of the best reference, averaged over prompts. Both range from 0 to 100.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from lorank.extras import require
from lorank.tasks.base import ModelKind, Split, Task, batches, evaluating, mean_loss
from lorank.tasks.collate import IGNORED, Example, padding_tokenizer
from lorank.tasks.errors import DataError
from lorank.tasks.settings import GenerationSettings
from lorank.tasks.sources import Row, load_rows
from lorank.tasks.splits import draw, read_parts, read_test
from lorank.tasks.template import render

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompted:
    """A prompt and its references."""

    prompt: str
    references: tuple[str, ...]


class GenerationTask(Task):
    """Text generation. An example is prompt + target + end of text, with labels on target and end of text.

    Prompt and target are tokenised separately, so that generation starts from exactly the tokens seen in training.

    Raises:
        DataError: a split or column does not exist, or the tokenizer has no end-of-text token.
    """

    model_kind: ModelKind = "causal_lm"
    label_names = ()

    def __init__(self, settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"The tokenizer {type(tokenizer).__name__} has no end-of-text token, so generation would never stop. "
                "Use a causal language model's own tokenizer."
            )
        self._start = _start_tokens(tokenizer)
        self.collator = DataCollatorForSeq2Seq(padding_tokenizer(tokenizer))
        self.has_test = settings.test_split is not None
        kept, held = read_parts(settings, self._load)
        self._prompts: dict[Split, list[Prompted]] = {"validation": draw(held, settings.max_eval, settings.seed)}
        self.train = draw(self._encode(kept), settings.max_train, settings.seed)
        self.validation = draw(self._encode(self._prompts["validation"]), None, settings.seed)

    @cached_property
    def test(self) -> list[Example]:
        """Encoded test examples (see `Task.test`).

        Raises:
            MissingPackageError: sacrebleu or rouge-score is not installed. A run reads `test` before training, so the
                error comes early.
        """
        _require_metrics()
        return self._encode(self._prompted("test"))

    def evaluate(
        self, model: nn.Module, split: Split = "test", *, batch_size: int = 32, progress: bool = True
    ) -> dict[str, float]:
        """`loss` (nats per target token), `bleu` and `rouge_l` (0 to 100); see `Task.evaluate`."""
        examples = self.test if split == "test" else self.validation
        loss = mean_loss(model, examples, self.collator, batch_size=batch_size, progress=progress)
        prompted = self._prompted(split)
        texts = self.generate(model, [p.prompt for p in prompted], batch_size=batch_size, progress=progress)
        return {"loss": loss, **text_scores(texts, [p.references for p in prompted])}

    def generate(
        self, model: nn.Module, prompts: Sequence[str], *, batch_size: int = 32, progress: bool = True
    ) -> list[str]:
        """Generates one text per prompt, in the order of the prompts; greedy, or by beam search if num_beams > 1."""
        tokenizer, settings = self._tokenizer, self._settings
        encoded = [self._prompt_tokens(prompt)[-settings.max_length :] for prompt in prompts]
        # batches of prompts of similar length need the least padding
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
        padding = padding_tokenizer(tokenizer, "left")
        config = GenerationConfig(  # type: ignore[no-untyped-call]  # it has no annotations
            do_sample=False,
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=padding.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        collate = DataCollatorWithPadding(padding)
        texts = [""] * len(prompts)
        generator: Any = model  # `generate` is not part of nn.Module
        with evaluating(model) as device:
            for part in batches(order, batch_size, "Generating", progress):
                batch = collate([_as_input(encoded[index]) for index in part])
                width = batch["input_ids"].shape[1]
                tokens = generator.generate(
                    **{name: value.to(device) for name, value in batch.items()}, generation_config=config
                )
                fresh: torch.Tensor = tokens[:, width:]  # (batch, width + new) → (batch, new)
                for index, text in zip(part, tokenizer.batch_decode(fresh, skip_special_tokens=True), strict=True):
                    texts[index] = text.strip()
        return texts

    def _prompted(self, split: Split) -> list[Prompted]:
        """The prompts of a split. Test prompts are read on first use."""
        if split not in self._prompts:
            settings = self._settings
            self._prompts[split] = draw(read_test(settings, self._load), settings.max_eval, settings.seed)
        return self._prompts[split]

    def _load(self, split: str) -> list[Prompted]:
        """Rows grouped by their prompt, in the order in which prompts first occur."""
        settings = self._settings
        where = f"Data set {settings.data!r}, split {split!r}"
        groups: dict[str, list[str]] = {}
        rows: Sequence[Row] = load_rows(settings.data, split, subset=settings.subset)
        for row in rows:
            groups.setdefault(render(settings.prompt, row, where), []).append(render(settings.target, row, where))
        return [Prompted(prompt, tuple(references)) for prompt, references in groups.items()]

    def _encode(self, groups: Sequence[Prompted]) -> list[Example]:
        longest, cut = self._settings.max_length, 0
        examples: list[Example] = []
        for group in groups:
            prompt = self._prompt_tokens(group.prompt)
            for reference in group.references:
                target = [*self._tokens(reference), self._tokenizer.eos_token_id]
                cut += len(prompt) + len(target) > longest
                # keep at least one token of the prompt: the first target token is predicted from it
                target = target[: longest - 1]
                kept = prompt[-(longest - len(target)) :]
                examples.append({**_as_input(kept + target), "labels": [IGNORED] * len(kept) + target})
        if cut:
            _log.warning(
                "%d of %d examples are longer than max_length=%d and were truncated.", cut, len(examples), longest
            )
        return examples

    def _prompt_tokens(self, prompt: str) -> list[int]:
        return self._start + self._tokens(prompt)

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` and `rouge_l` of generated texts, both 0 to 100.

    Args:
        texts: one text per prompt.
        references: one or more references per prompt.

    Raises:
        MissingPackageError: sacrebleu or rouge-score is not installed.
    """
    _require_metrics()
    # slow to import, and needed only at the end of a run
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    most = max(len(group) for group in references)
    # sacrebleu expects one list per reference number, with None for a prompt that has fewer references
    columns: Any = [[group[number] if number < len(group) else None for group in references] for number in range(most)]
    bleu = BLEU().corpus_score(list(texts), columns).score
    scorer = RougeScorer(["rougeL"])
    best = [
        scorer.score_multi(list(group), text)["rougeL"].fmeasure for text, group in zip(texts, references, strict=True)
    ]
    return {"bleu": float(bleu), "rouge_l": 100 * sum(best) / len(best)}


def _require_metrics() -> None:
    require("BLEU and ROUGE-L of a generation task", "sacrebleu", "rouge_score")


def _as_input(tokens: list[int]) -> dict[str, list[int]]:
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, if the tokenizer adds one to every text (Llama does, GPT-2 does not)."""
    bos = tokenizer.bos_token_id
    tokens: list[int] = tokenizer("a")["input_ids"]
    return [bos] if isinstance(bos, int) and tokens[:1] == [bos] else []
