"""Whether the exact engine fits a model, shown by one watched forward and one comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import AdapterError
from lorank.lora.layer import AdapterLayers
from lorank.scoring.loss import base_of, field, forward_arguments, own_loss, require_finite
from lorank.scoring.microbatch import is_by_sample, repeated, rows_of
from lorank.scoring.prefix_cache.block_tracing import tracing
from lorank.scoring.prefix_cache.variant_runner import ModelFit, VariantRunner
from lorank.scoring.targets import Head, Targets, find_form, output_embedding
from lorank.scoring.variants import Gates, Unsuited, describe, in_order

# Stacking fills a device that one batch leaves idle. A CPU is busy with 512 tokens: two variants took up to a
# third longer together than one after the other. A GPU wants more (its figure is reasoned, not measured). The logits
# are bounded apart: 2²⁸ in float32 are 1 GiB.
TOKENS_PER_FORWARD: Mapping[str, int] = {"cpu": 512}
TOKENS_PER_FORWARD_GPU = 16_384
LOGITS_PER_FORWARD = 2**28


def check_compatibility(
    model: nn.Module, layers: AdapterLayers, part: Mapping[str, Any], max_rows: int | None
) -> ModelFit:
    """Watches one forward of M, and compares the engine's loss of one ablated variant with a plain forward's.

    Raises:
        Unsuited: anything does not fit or differs.
    """
    try:
        return _find_fit(model, layers, part, max_rows)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AdapterError) as error:
        raise Unsuited(f"its forward raised {type(error).__name__}: {error}") from error


def _find_fit(model: nn.Module, layers: AdapterLayers, part: Mapping[str, Any], max_rows: int | None) -> ModelFit:
    rows = rows_of(part)
    by_sample = is_by_sample(part, rows)
    # One sample looks like any other axis of length one: it is watched twice over, unless it may not be stacked anyway.
    copies = 2 if rows == 1 and by_sample and max_rows != 1 else 1
    embedding = output_embedding(base_of(model))
    with tracing(model, layers, rows * copies, embedding) as seen:
        watched = repeated(part, copies)
        output = model(**forward_arguments(model), **watched)
    trace = seen()
    loss, logits = field(output, "loss"), field(output, "logits")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise Unsuited("its forward gives no loss under that name")
    require_finite(loss, "the model")
    form = find_form(logits, watched["labels"], loss)
    selecting = embedding is not None and trace.head and form != "pooled"
    classes, device = int(logits.shape[-1]), logits.device

    def max_copies(n: int, targets: Targets) -> int:
        if not by_sample:
            return 1
        if max_rows is not None:
            return max(1, max_rows // n)
        width = TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD_GPU) // (n * trace.tokens)
        positions = n if form == "pooled" else targets.count if selecting else n * trace.tokens
        return max(1, min(width, LOGITS_PER_FORWARD // (positions * classes)))

    found = ModelFit(model, Head(model, embedding if selecting else None), trace, form, max_copies)
    dtypes = {*trace.dtypes, logits.dtype}
    del output, logits
    if layers.total_rank:
        _rehearse(found, layers, part, float(loss), dtypes)
    return found


def _rehearse(
    found: ModelFit, layers: AdapterLayers, part: Mapping[str, Any], loss: float, dtypes: set[torch.dtype]
) -> None:
    """Compares L(M) and one L(M without r), with as many blocks skipped as ever, with plain forwards."""
    gates = Gates(layers)
    runner = VariantRunner(found, layers, gates, part, {})
    # The last layer that can be stacked; of its ranks, the one with the largest update.
    name = max(
        (name for name, _ in in_order(layers)),
        key=lambda name: (name in found.trace.per_sample, found.trace.start[name]),
    )
    layer = layers[name]
    k = int((layer.A.detach().float().norm(dim=1) * layer.B.detach().float().norm(dim=0)).argmax())
    variant = gates.variants(name, "without")[k]  # (r,)
    ones = gates.variants(name, "alone").sum(dim=0)  # (r,)
    gates.background("without")
    with runner.patched():
        losses = runner.losses(name, torch.stack([variant, ones]), "without") / runner.targets.count  # (2,)
    layer.gate = variant
    expected = (float(own_loss(found.model, part, None)), loss)
    gates.restore(name, "without")
    tolerance = _tolerance(dtypes, runner.targets.labels.device) * abs(loss)
    for value, wanted, what in zip(losses.tolist(), expected, (describe(name, k, "without"), "the model"), strict=True):
        if not abs(value - wanted) <= tolerance:
            raise Unsuited(f"the loss of {what} came out as {value:.9g}, where a plain forward gives {wanted:.9g}")


def _tolerance(dtypes: set[torch.dtype], device: torch.device) -> float:
    """How far two ways to compute one loss may differ by rounding alone, relative to it."""
    if dtypes & {torch.float16, torch.bfloat16} or (
        device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    ):
        return 5e-3
    return 1e-5 if torch.float32 in dtypes else 1e-6
