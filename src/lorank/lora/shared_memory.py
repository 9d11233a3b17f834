"""Tensors that share memory, also as different Parameters: two names, transposed or overlapping views.

Sharing cannot be seen by ``id``: PEFT's ``ensure_weight_tying`` makes a new Parameter around the tensor of another.
"""

from __future__ import annotations

from torch import Tensor

MemoryRange = tuple[str, int, int]
"""Device, first byte, and the byte after the last, of the elements of a tensor."""


def memory_range(tensor: Tensor) -> MemoryRange | None:
    """The memory that the elements of a tensor lie in.

    None for a tensor without memory of its own: empty (rank 0, ZeRO-3's placeholders), on the meta device, or of a
    tensor class of another library.
    """
    data = tensor.detach()
    if type(data) is not Tensor or data.device.type == "meta" or not data.numel():
        return None
    # A transposed view has the same elements in another order, so its last element is found by the strides.
    last = sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
    return str(data.device), data.data_ptr(), data.data_ptr() + (last + 1) * data.element_size()


def overlap(first: MemoryRange | None, second: MemoryRange | None) -> bool:
    """Whether two tensors share memory."""
    if first is None or second is None or first[0] != second[0]:
        return False
    return first[1] < second[2] and second[1] < first[2]
