"""PEFT's two numbers for the factor s of an update: alpha, which files hold, and the live scaling, which layers use.

s = alpha / r        rsLoRA: s = alpha / √r
"""

from __future__ import annotations

import math


def alpha_for(scaling: float, rank: int, use_rslora: bool) -> float:
    """PEFT's alpha, for which alpha / r (rsLoRA: alpha / √r) is s. A whole number is returned as an int."""
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """PEFT's scaling: alpha / r, or alpha / √r for rsLoRA. 0 for rank 0."""
    return alpha / (math.sqrt(rank) if use_rslora else rank) if rank else 0.0
