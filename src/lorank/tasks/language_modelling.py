"""Language modelling on plain text: loss per token and perplexity over blocks of equal length."""

import math
from collections.abc import Sequence
from functools import cached_property

from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lorank.tasks.base import ModelKind, Split, Task, mean_loss
from lorank.tasks.collate import Example, padding_tokenizer
from lorank.tasks.errors import DataError
from lorank.tasks.permuted_words import replace_words, word_permutation
from lorank.tasks.settings import LanguageModellingSettings
from lorank.tasks.sources import Row, load_rows
from lorank.tasks.splits import draw, read_parts, read_test
from lorank.tasks.template import render


class LanguageModellingTask(Task):
    """Language modelling. Texts are joined by the end-of-text token and cut into blocks; max_train and max_eval count
    blocks. With permute_words, frequent words are exchanged before (see `lorank.tasks.permuted_words`).

    Raises:
        DataError: a split or column does not exist, the tokenizer has no end-of-text token, a split does not fill one
            block, or the training text has fewer words than are to be permuted.
    """

    model_kind: ModelKind = "causal_lm"
    label_names = ()

    def __init__(self, settings: LanguageModellingSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self.collator = DataCollatorForSeq2Seq(padding_tokenizer(tokenizer))
        self.has_test = settings.test_split is not None
        kept, held = read_parts(settings, self._load)
        self._replacements = self._permutation(kept, settings.permute_words) if settings.permute_words else {}
        self.train = self._encode(kept, settings.train_split, settings.max_train)
        self.validation = self._encode(held, settings.validation_split or settings.train_split, settings.max_eval)

    @cached_property
    def test(self) -> list[Example]:
        """Encoded test blocks (see `Task.test`)."""
        settings = self._settings
        return self._encode(read_test(settings, self._load), settings.test_split or "", settings.max_eval)

    def evaluate(
        self, model: nn.Module, split: Split = "test", *, batch_size: int = 32, progress: bool = True
    ) -> dict[str, float]:
        """`loss` (nats per token) and `perplexity`, its exponential; see `Task.evaluate`."""
        examples = self.test if split == "test" else self.validation
        loss = mean_loss(model, examples, self.collator, batch_size=batch_size, progress=progress)
        return {"loss": loss, "perplexity": math.exp(loss)}

    def _load(self, split: str) -> list[Row]:
        return load_rows(self._settings.data, split, subset=self._settings.subset)

    def _encode(self, rows: Sequence[Row], split: str, limit: int | None) -> list[Example]:
        settings = self._settings
        texts = self._texts(rows, split)
        if self._replacements:
            texts = [replace_words(text, self._replacements) for text in texts]
        blocks = pack(texts, self._tokenizer, settings.block_size)
        if not blocks:
            raise DataError(
                f"{self._where(split)}: its text does not fill one block of {settings.block_size} tokens. "
                "Give more text or a smaller block_size."
            )
        return draw(blocks, limit, settings.seed)

    def _permutation(self, rows: Sequence[Row], count: int) -> dict[str, str]:
        """From the training rows alone: held-out text decides nothing."""
        split = self._settings.train_split
        return word_permutation(self._texts(rows, split), count, self._settings.seed, self._where(split))

    def _texts(self, rows: Sequence[Row], split: str) -> list[str]:
        return [render(self._settings.template, row, self._where(split)) for row in rows]

    def _where(self, split: str) -> str:
        return f"Data set {self._settings.data!r}, split {split!r}"


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> list[Example]:
    """Joins texts, each with an end-of-text token at its end, and cuts them into blocks of `block_size` tokens.

    The last, incomplete block is dropped.

    Raises:
        DataError: the tokenizer has no end-of-text token to put between texts.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} has no end-of-text token to put between texts. "
            "Use a causal language model's own tokenizer."
        )
    # `verbose=False`: no warning for a text longer than the model's context, since blocks are shorter
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for tokens in encoded for token in (*tokens, tokenizer.eos_token_id)]
    starts = range(0, len(stream) - block_size + 1, block_size)
    blocks = [stream[start : start + block_size] for start in starts]
    return [{"input_ids": block, "attention_mask": [1] * block_size, "labels": list(block)} for block in blocks]
