"""What the model card of an adapter says about the run that trained it: method, budget, steps."""

from __future__ import annotations

from lorank.training.run_state import RunState


def about_run(run: RunState) -> dict[str, str]:
    """Lines of a model card, label → text."""
    described = run.allocator.describe()
    method = str(described.pop("method"))
    described.pop("budget", None)
    defaults = type(run.allocator)
    changed = {name: value for name, value in described.items() if value != getattr(defaults, name, None)}
    settings = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    without = "none" if run.allocator.moves_ranks else "none: ranks do not move"
    return {
        "Method": f"{method}({settings})" if settings else method,
        "Budget": without if run.budget is None else run.budget.describe(),
        "Steps": f"{run.step:,} of {run.info.total_steps:,}",
    }
