"""Operations on batches: count the samples, split a batch into parts, repeat its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.scoring.ablation_variants import IncompatibleError
from lorank.scoring.loss import IGNORED, base_of

TOKENS_PER_PASS = 2048
"""Tokens in one forward and backward pass: as many as a training step of a small batch, so that memory suffices."""
SAMPLES_WITHOUT_TOKENS = 32
"""Samples in one pass if samples are not token sequences (images, for example)."""


def count_samples(batch: Mapping[str, Any]) -> int:
    """n, the number of samples."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not labels.dim():
        raise IncompatibleError("its batch has no labels under that name")
    return len(labels)


def has_one_row_per_sample(batch: Mapping[str, Any], rows: int) -> bool:
    """Whether every tensor has one row per sample, so that it can be repeated and split."""
    return all(isinstance(value, Tensor) and value.dim() and value.shape[0] == rows for value in batch.values())


def split(batch: Mapping[str, Any], max_rows: int | None) -> list[Mapping[str, Any]]:
    """The batch in parts of at most ``max_rows`` samples. All parts but the last have equal size. Parts without labels
    are left out."""
    rows = count_samples(batch)
    if max_rows is None or rows <= max_rows:
        return [batch]
    if not has_one_row_per_sample(batch, rows):
        raise IncompatibleError(
            f"its batch of {rows} samples cannot be split: some tensor does not have one row per sample"
        )
    size = -(-rows // -(-rows // max_rows))
    parts = [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, rows, size)]
    return [part for part in parts if count_labels(part)]


def inputs_without_labels(model: nn.Module, part: Mapping[str, Any]) -> dict[str, Any]:
    """The part without its labels, for a forward pass that computes logits and no loss."""
    inputs = {key: value for key, value in part.items() if key != "labels"}
    shift_right = getattr(base_of(model), "prepare_decoder_input_ids_from_labels", None)
    if shift_right is not None and "decoder_input_ids" not in part:  # the model makes these from the labels
        inputs["decoder_input_ids"] = shift_right(labels=part["labels"])
    return inputs


def count_labels(part: Mapping[str, Any]) -> int:
    """The number of labels that are not ignored."""
    return int(torch.count_nonzero(part["labels"] != IGNORED))


def labels_in_mean_loss(batch: Mapping[str, Any]) -> int:
    """N, the number of labels in the mean loss of a batch. Causal language models predict all labels but the first."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return 1
    if labels.dim() > 1 and labels.dtype == torch.long and labels.shape[1:] == _token_shape(batch):
        return max(1, count_labels({"labels": labels[:, 1:]}))
    return max(1, count_labels(batch))


def _token_shape(batch: Mapping[str, Any]) -> torch.Size | None:
    tokens = batch.get("input_ids")
    return tokens.shape[1:] if isinstance(tokens, Tensor) else None


def repeat(x: Tensor, copies: int) -> Tensor:
    """(n, …) → (copies · n, …): the batch concatenated ``copies`` times. Always a new tensor, also for one copy."""
    return x.repeat(copies, *[1] * (x.dim() - 1))


def repeat_batch(batch: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """Every tensor of the batch concatenated ``copies`` times along its first axis."""
    return dict(batch) if copies == 1 else {key: repeat(value, copies) for key, value in batch.items()}


def sequence_lengths(batch: Mapping[str, Any]) -> Tensor | None:
    """The length of each sample in tokens, (n,): up to the last token that is attended to or has a label.

    None if the batch holds no token sequences.
    """
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


def exceeds_one_pass(batch: Mapping[str, Any], max_rows: int | None = None) -> bool:
    """Whether the batch is too large for one pass."""
    sizes, labels = sequence_lengths(batch), batch.get("labels")
    rows = len(labels) if isinstance(labels, Tensor) and labels.dim() else 1
    if max_rows is not None:
        return rows > max_rows
    return rows > SAMPLES_WITHOUT_TOKENS if sizes is None else rows * int(sizes.max()) > TOKENS_PER_PASS


def first_pass(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """As many of the batch's samples as one pass takes; all samples if the batch cannot be split."""
    if not exceeds_one_pass(batch) or "labels" not in batch:
        return batch
    rows = count_samples(batch)
    if not has_one_row_per_sample(batch, rows):
        return batch
    parts = split_into_passes(batch, torch.arange(rows), TOKENS_PER_PASS, None)
    return parts[0] if parts else batch


def split_into_passes(
    batch: Mapping[str, Any], rows: Tensor, tokens: int, max_rows: int | None, *, trim: bool = True
) -> list[dict[str, Any]]:
    """Splits samples into parts for one pass each: similar lengths together, no padding after the longest sample.

    Args:
        batch: every tensor has one row per sample.
        rows: (k,), the indices of the samples.
        tokens: the most tokens in one part. A single sample is never split, even if it is longer.
        max_rows: the most samples in one part; None: as many as ``tokens`` allows.
        trim: whether padding after the longest sample is cut off. Not all models take every length.
    """
    sizes = sequence_lengths(batch)
    if sizes is None:
        width = max_rows or SAMPLES_WITHOUT_TOKENS
        return [_select_samples(batch, part) for part in torch.split(rows, width)]
    rows = rows[torch.argsort(sizes[rows], descending=True, stable=True)]
    parts, start = [], 0
    while start < len(rows):
        longest = max(1, int(sizes[rows[start]]))
        width = max(1, tokens // longest) if max_rows is None else max_rows
        part = _select_samples(batch, rows[start : start + width])
        parts.append(_trim_padding(part, longest) if trim else part)
        start += width
    return [part for part in parts if count_labels(part)]


def _select_samples(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    return {key: value[rows.to(value.device)] for key, value in batch.items()}


def _trim_padding(part: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Every (n, T) and (n, T, …) tensor cut to ``longest``, if the batch has an attention mask of shape (n, T)."""
    mask = part.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return dict(part)
    shape = mask.shape  # (n, T)
    return {key: value[:, :longest] if value.shape[:2] == shape else value for key, value in part.items()}
