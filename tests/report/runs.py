"""Small runs with fixed numbers, for pictures and pages."""

from __future__ import annotations

import math
from typing import Any

from lorank.report.numbers import CurveNumbers, Frame, Quality, RunNumbers, Worth

HOSTILE = "</script><b>bold</b>"
PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{block}.{projection}" for block in range(3) for projection in PROJECTIONS]


def made_run(name: str = "balanced", **changes: Any) -> RunNumbers:
    """Twelve modules made with rank 4; three allocations move ranks from q and v to the feed-forward maps."""
    frames = []
    for allocation in range(4):
        ranks = {
            name: 4 + (allocation if "mlp" in name else -allocation) * (index % 3 + 1) // 3
            for index, name in enumerate(NAMES)
        }
        heads = {name: [rank, max(0, rank - allocation)] for name, rank in ranks.items() if "attn" in name}
        moved = {"pruned": 6, "added": 6} if allocation else {}
        frames.append(Frame(10 * allocation, ranks, 100 * sum(ranks.values()), **moved, limit=4900.0, heads=heads))
    last = frames[-1]
    values: dict[str, Any] = {
        "frames": frames,
        "reference": dict.fromkeys(NAMES, 4),
        "reference_name": "the adapter as it was made",
        "worth": Worth(30, {name: [0.5, 0.25, 0.001 * index] for index, name in enumerate(NAMES)}, {NAMES[0]: [2]}),
        "losses": [(step, 5 - 0.05 * step) for step in range(0, 41, 5)],
        "validation": [(20, 4.1), (40, 3.2)],
        "steps": 40,
        "asked": [("model", "tiny"), ("data", HOSTILE)],
        "came_out": [("ranks", f"48 → {last.total}")],
        "cost": [("training", "12 s")],
        "notes": ["One seed."],
        "curve": CurveNumbers([(1000, 4.0), (2000, 3.5), (4000, 3.4)], (2000, 3.5), "e2e_nlg, 64 examples"),
        "quality": Quality("test loss", 3.2, "e2e_nlg with tiny", name, 0),
    }
    return RunNumbers(name, "BalancedLoRA", **{**values, **changes})


def unmoved_run(name: str = "plain", loss: float = 3.6) -> RunNumbers:
    """A run in which no rank moved, from a loop without a log: only the history is known."""
    frame = Frame(0, dict.fromkeys(NAMES, 4), 4800)
    return RunNumbers(
        name, "LoRA", [frame], frame.ranks, quality=Quality("test loss", loss, "e2e_nlg with tiny", name, 0)
    )


def unusual_run() -> RunNumbers:
    """A run as a stranger or a broken method may leave it: names that are markup, scores that are no numbers."""
    ranks = {HOSTILE: 3, "a.0.b": 0, "'; datum.x": 1, "ünïcode 🤖": 2}
    frames = [Frame(0, ranks, 0), Frame(5, {**ranks, HOSTILE: 1}, 0, pruned=2)]
    worth = Worth(5, {HOSTILE: [math.nan, math.inf, -1.0], "gone": [1.0]}, {HOSTILE: [0, 1]})
    return RunNumbers(HOSTILE, HOSTILE, frames, ranks, worth=worth, notes=[HOSTILE], asked=[(HOSTILE, HOSTILE)])
