"""ARD-LoRA."""

from lorank.allocators.ard.allocator import ARDLoRA

__all__ = ["ARDLoRA"]
