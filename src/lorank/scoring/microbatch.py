"""A batch in parts: how many samples it has, whether it can be split, and the same samples again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.scoring.loss import IGNORED, base_of
from lorank.scoring.variants import Unsuited

TOKENS_PER_PASS = 2048
"""Tokens in one forward and backward pass: what a training step of a small batch has, so that memory suffices."""
SAMPLES_WITHOUT_TOKENS = 32
"""Samples in one pass where they are no token sequences (images)."""


def rows_of(batch: Mapping[str, Any]) -> int:
    """n, the number of samples."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not labels.dim():
        raise Unsuited("its batch has no labels under that name")
    return len(labels)


def is_by_sample(batch: Mapping[str, Any], rows: int) -> bool:
    """Whether every tensor has one row per sample, so that it can be repeated and split."""
    return all(isinstance(value, Tensor) and value.dim() and value.shape[0] == rows for value in batch.values())


def split(batch: Mapping[str, Any], max_rows: int | None) -> list[Mapping[str, Any]]:
    """The batch in parts of at most ``max_rows`` samples, of equal size but for one; parts without labels left out."""
    rows = rows_of(batch)
    if max_rows is None or rows <= max_rows:
        return [batch]
    if not is_by_sample(batch, rows):
        raise Unsuited(f"its batch of {rows} samples cannot be split: some tensor does not have one row per sample")
    size = -(-rows // -(-rows // max_rows))
    parts = [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, rows, size)]
    return [part for part in parts if labelled(part)]


def inputs_of(model: nn.Module, part: Mapping[str, Any]) -> dict[str, Any]:
    """The part without its labels, for a forward that makes logits and no loss."""
    inputs = {key: value for key, value in part.items() if key != "labels"}
    shift_right = getattr(base_of(model), "prepare_decoder_input_ids_from_labels", None)
    if shift_right is not None and "decoder_input_ids" not in part:  # else the model makes them from the labels
        inputs["decoder_input_ids"] = shift_right(labels=part["labels"])
    return inputs


def labelled(part: Mapping[str, Any]) -> int:
    """How many labels are not ignored."""
    return int(torch.count_nonzero(part["labels"] != IGNORED))


def repeat(x: Tensor, copies: int) -> Tensor:
    """(n, …) → (copies · n, …), the whole batch again and again; a new tensor also for one copy."""
    return x.repeat(copies, *[1] * (x.dim() - 1))


def repeated(batch: Mapping[str, Any], copies: int) -> dict[str, Any]:
    return dict(batch) if copies == 1 else {key: repeat(value, copies) for key, value in batch.items()}


def lengths(batch: Mapping[str, Any]) -> Tensor | None:
    """How many tokens of each sample count, (n,): up to the last that is attended to or labelled. None: no tokens."""
    of_tokens = {
        name: value
        for name in ("attention_mask", "input_ids", "labels")
        if isinstance(value := batch.get(name), Tensor) and value.dim() == 2
    }  # (n, T) each
    if not of_tokens:
        return None
    tokens = next(iter(of_tokens.values()))
    counts = tokens != 0 if "attention_mask" in of_tokens else torch.ones_like(tokens, dtype=torch.bool)
    labels = of_tokens.get("labels")
    if labels is not None and labels.shape == counts.shape:
        counts = counts | (labels != IGNORED)
    positions = torch.arange(1, counts.shape[1] + 1, device=counts.device)  # (T,)
    return (counts * positions).amax(1).cpu()


def is_larger_than_a_pass(batch: Mapping[str, Any], max_rows: int | None = None) -> bool:
    """Whether one pass should not take the batch whole."""
    sizes, labels = lengths(batch), batch.get("labels")
    rows = len(labels) if isinstance(labels, Tensor) and labels.dim() else 1
    if max_rows is not None:
        return rows > max_rows
    return rows > SAMPLES_WITHOUT_TOKENS if sizes is None else rows * int(sizes.max()) > TOKENS_PER_PASS


def one_pass(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """As many of the batch's samples as one pass takes: what a first look at it needs. All, if it cannot be split."""
    if not is_larger_than_a_pass(batch) or "labels" not in batch:
        return batch
    rows = rows_of(batch)
    if not is_by_sample(batch, rows):
        return batch
    parts = in_passes(batch, torch.arange(rows), TOKENS_PER_PASS, None)
    return parts[0] if parts else batch


def in_passes(batch: Mapping[str, Any], rows: Tensor, tokens: int, max_rows: int | None) -> list[dict[str, Any]]:
    """Samples in parts that one pass takes, those of similar length together, without the padding after the longest.

    Args:
        batch: one row per sample in every tensor.
        rows: (k,), which samples.
        tokens: in one part at most, except that one sample is never split.
        max_rows: samples in one part at most; None: what ``tokens`` allows.
    """
    sizes = lengths(batch)
    if sizes is None:
        width = max_rows or SAMPLES_WITHOUT_TOKENS
        return [_taken(batch, part) for part in torch.split(rows, width)]
    rows = rows[torch.argsort(sizes[rows], descending=True, stable=True)]
    parts, start = [], 0
    while start < len(rows):
        longest = max(1, int(sizes[rows[start]]))
        width = max(1, tokens // longest) if max_rows is None else max_rows
        parts.append(_trimmed(_taken(batch, rows[start : start + width]), longest))
        start += width
    return [part for part in parts if labelled(part)]


def _taken(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    return {key: value[rows.to(value.device)] for key, value in batch.items()}


def _trimmed(part: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Every (n, T) tensor cut to (n, longest), where a mask says that nothing behind is attended to."""
    mask = part.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return dict(part)
    shape = mask.shape  # (n, T)
    return {key: value[:, :longest] if value.shape == shape else value for key, value in part.items()}
