"""ARD-LoRA: a learned rank for every attention head and every module without heads."""

from lorank.allocators.ard.allocator import ARDLoRA

__all__ = ["ARDLoRA"]
