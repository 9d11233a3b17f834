"""Errors that lorank raises on purpose: the base class, and the errors of LoRA layers, scoring and training.

The errors of configuration, data and run folders are defined beside the code that raises them. They derive from the
same base class. Each message says what was given, what was expected and what to do.
"""


class LorankError(Exception):
    """Base class: catch this to catch everything that lorank raises on purpose."""


class AdapterError(LorankError):
    """The model's LoRA layers cannot be found, or lorank does not support their kind."""


class PlanError(LorankError):
    """A plan keeps ranks that a layer does not have, or adds more ranks than a layer can hold."""


class OptimizerStateError(LorankError):
    """The optimiser does not hold the adapter's parameters, or its state or closure cannot follow changes of rank."""


class ValidationBatchError(LorankError):
    """The validation batch is missing, has no labels, or gives a NaN or infinite loss."""


class NonFiniteError(LorankError):
    """A gradient, a weight or a score holds NaN or infinity."""


class AllocatorError(LorankError, TypeError):
    """Something else than an allocator was given as the method."""


class ScheduleError(LorankError):
    """An allocator's schedule or budget does not fit the run."""


class BudgetError(LorankError, ValueError):
    """A budget cannot be parsed, is out of range, or does not fit the modules that share it."""


class ResumeError(LorankError):
    """A saved rank state belongs to another method, model or budget, or is incomplete."""


class DisagreementError(LorankError):
    """The processes of one training run differ in their ranks, weights, optimiser state or settings."""
