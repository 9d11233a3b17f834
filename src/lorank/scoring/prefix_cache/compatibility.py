"""Checks whether the exact engine supports a model, by one traced forward pass and one comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import ValidationBatchError
from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation_variants import Gates, IncompatibleError, describe, layers_with_ranks
from lorank.scoring.loss import base_of, detached_loss, forward_arguments, logits_of, loss_of, require_finite
from lorank.scoring.microbatch import count_samples, has_one_row_per_sample, repeat_batch
from lorank.scoring.prefix_cache.block_tracing import trace_blocks
from lorank.scoring.prefix_cache.variant_runner import ModelFit, VariantRunner
from lorank.scoring.targets import Targets, find_form, find_head, output_embedding

# Stacking variants uses a device better if one batch is too small for it. For a CPU 512 tokens are enough: two variants
# took up to a third longer together than one after the other. A GPU needs more; its figure is an estimate, not a
# measurement. The number of logits is limited separately: 2²⁸ in float32 are 1 GiB.
TOKENS_PER_FORWARD: Mapping[str, int] = {"cpu": 512}
TOKENS_PER_FORWARD_GPU = 16_384
LOGITS_PER_FORWARD = 2**28


def check_compatibility(
    model: nn.Module, layers: AdapterLayers, part: Mapping[str, Any], max_rows: int | None
) -> ModelFit:
    """Traces one forward pass of M, and compares the engine's loss of one ablated variant with a plain forward pass.

    Raises:
        IncompatibleError: the engine does not support the model, its loss or its batch, or the losses differ.
    """
    try:
        return _find_fit(model, layers, part, max_rows)
    except (IncompatibleError, ValidationBatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model may raise anything when it is called in another way
        raise IncompatibleError(f"its forward raised {type(error).__name__}: {error}") from error


def _find_fit(model: nn.Module, layers: AdapterLayers, part: Mapping[str, Any], max_rows: int | None) -> ModelFit:
    rows = count_samples(part)
    by_sample = has_one_row_per_sample(part, rows)
    # A single sample cannot be told from another axis of length 1. It is therefore traced twice in one batch, unless
    # stacking is not allowed.
    copies = 2 if rows == 1 and by_sample and max_rows != 1 else 1
    embedding = output_embedding(base_of(model))
    with trace_blocks(model, layers, rows * copies, embedding) as read_trace:
        watched = repeat_batch(part, copies)
        output = model(**forward_arguments(model), **watched)
    trace = read_trace()
    loss, logits = loss_of(output, watched), logits_of(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise IncompatibleError("its forward gives no loss under that name")
    require_finite(loss, "the model")
    form = find_form(logits, watched["labels"], loss)
    if form == "pooled" or not trace.head:
        embedding = None
    head = find_head(model, watched, Targets.of(form, watched["labels"]), logits, embedding)
    classes, device = int(logits.shape[-1]), logits.device

    def max_copies(n: int, targets: Targets) -> int:
        if not by_sample:
            return 1
        if max_rows is not None:
            return max(1, max_rows // n)
        width = TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD_GPU) // (n * trace.tokens)
        positions = n if form == "pooled" else targets.count if head.module is not None else n * trace.tokens
        return max(1, min(width, LOGITS_PER_FORWARD // (positions * classes)))

    found = ModelFit(model, head, trace, form, max_copies)
    dtypes = {*trace.dtypes, logits.dtype}
    del output, logits
    if layers.total_rank:
        _check_one_variant(found, layers, part, float(loss), dtypes)
    return found


def _check_one_variant(
    found: ModelFit, layers: AdapterLayers, part: Mapping[str, Any], loss: float, dtypes: set[torch.dtype]
) -> None:
    """Compares the engine's L(M) and one L(M without r) with plain forward passes, with the most blocks skipped."""
    gates = Gates(layers)
    runner = VariantRunner(found, layers, gates, part, {})
    # The last layer whose variants can be stacked; of its ranks, the rank with the largest update.
    name = max(
        (name for name, _ in layers_with_ranks(layers)),
        key=lambda name: (name in found.trace.per_sample, found.trace.start[name]),
    )
    layer = layers[name]
    k = int(layer.layout.norms(layer.A.detach().float(), layer.B.detach().float()).argmax())
    variant = gates.variants(name, "without")[k]  # (r,)
    ones = gates.variants(name, "alone").sum(dim=0)  # (r,)
    gates.background("without")
    with runner.patched():
        losses = runner.losses(name, torch.stack([variant, ones]), "without") / runner.targets.count  # (2,)
    layer.gate = variant
    expected = (float(detached_loss(found.model, part, None)), loss)
    gates.restore(name, "without")
    tolerance = _tolerance(dtypes, runner.targets.labels.device) * abs(loss)
    for value, wanted, what in zip(losses.tolist(), expected, (describe(name, k, "without"), "the model"), strict=True):
        if not abs(value - wanted) <= tolerance:
            raise IncompatibleError(
                f"the engine's loss of {what} is {value:.9g}, but a plain forward pass gives {wanted:.9g}"
            )


def _tolerance(dtypes: set[torch.dtype], device: torch.device) -> float:
    """How far two computations of the same loss may differ by rounding, relative to the loss."""
    if dtypes & {torch.float16, torch.bfloat16} or (
        device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    ):
        return 5e-3
    return 1e-5 if torch.float32 in dtypes else 1e-6
