"""A convolution as a linear map of patches: x as (tokens, d_in), and dy as (tokens, d_out).

    y[t] = Σ_{inputs, kernel} W[·, input, offset] x[input, t + offset]

Every output position is a token. Its input is the patch under the kernel, d_in = inputs × kernel numbers in the order
of A's axes. The patches are those that PEFT's A sees: with the kernel, the stride and the padding of W, and no
dilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 2**24
"""Numbers of patches (64 MiB in float32) that are formed at a time."""


def tokens_of(x: Tensor, dy: Tensor, lora_A: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of one call of a convolution, in parts.

    Args:
        x: (n, inputs, positions…), or one sample without n.
        dy: (n, outputs, positions…), the gradient at the output.
        lora_A: the convolution that PEFT made for A.

    Yields:
        Patches (tokens, inputs × kernel), and gradients (tokens, outputs).
    """
    spatial = len(lora_A.kernel_size)
    if x.dim() == spatial + 1:
        x, dy = x.unsqueeze(0), dy.unsqueeze(0)
    kernel = lora_A.weight.shape[1:].numel()  # inputs × kernel
    tokens_per_sample = dy.shape[2:].numel()
    rows = max(1, LARGEST // max(1, kernel * tokens_per_sample))
    for few, gradient in zip(torch.split(x, rows), torch.split(dy, rows), strict=True):
        yield _patches(few, lora_A), gradient.movedim(1, -1).reshape(-1, dy.shape[1])


def _patches(x: Tensor, lora_A: Any) -> Tensor:
    """(n, inputs, positions…) → (tokens, inputs × kernel)."""
    spatial = len(lora_A.kernel_size)
    windows = F.pad(x, lora_A._reversed_padding_repeated_twice)
    for axis, (size, step) in enumerate(zip(lora_A.kernel_size, lora_A.stride, strict=True)):
        windows = windows.unfold(2 + axis, size, step)  # (n, inputs, outputs…, kernel…)
    return windows.movedim(1, 1 + spatial).flatten(1 + spatial).flatten(0, spatial)
