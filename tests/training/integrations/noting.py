"""An integration that notes which of its hooks run."""

from __future__ import annotations

from lorank.errors import LorankError
from lorank.training.integrations.base import Integration

HOOKS = (
    "on_start",
    "before_step",
    "before_read",
    "on_decision",
    "after_resize",
    "after_allocation",
    "after_step",
    "on_end",
)


class Noting(Integration):
    """Notes under its name which of its hooks run."""

    def __init__(self, name: str, notes: list[str], fails_in: str = "") -> None:
        for hook in HOOKS:
            setattr(self, hook, lambda *_, hook=hook: self._note(name, hook, notes, fails_in))

    @staticmethod
    def _note(name: str, hook: str, notes: list[str], fails_in: str) -> None:
        notes.append(f"{name}.{hook}")
        if hook == fails_in:
            raise LorankError(f"{name} cannot")
