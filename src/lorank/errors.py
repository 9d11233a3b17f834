"""Errors that lorank raises on purpose: their base class, and those of the engine.

Errors of configuration, data and run folders are beside the code that raises them, and derive from the same base. Each
message says what was given, what was expected and what to do.
"""


class LorankError(Exception):
    """Base class: catch this to catch everything that lorank raises on purpose."""


class AdapterError(LorankError):
    """The model's LoRA layers cannot be found, or are of a kind that lorank cannot work with."""


class PlanError(LorankError):
    """A plan asks for ranks that a layer does not have or cannot hold."""


class OptimizerStateError(LorankError):
    """The optimiser does not hold the adapter's parameters, or its state has a shape that cannot be resized."""


class ValidationBatchError(LorankError):
    """The batch that ranks are scored on is missing, has no labels, or gives a loss that is not finite."""


class NonFiniteError(LorankError):
    """A gradient or a score holds NaN or infinity."""


class ScheduleError(LorankError):
    """An allocator's schedule or budget does not fit the run."""


class BudgetError(LorankError, ValueError):
    """A budget cannot be read, is out of its range, or does not fit the modules that are to share it."""


class ResumeError(LorankError):
    """A saved state belongs to another method, model or budget, or is incomplete."""


class DisagreementError(LorankError):
    """Processes that train one model together do not have the same ranks, weights, optimiser state or settings."""
