"""What lorank knows about optimisers: a table of rules, and the optimisers that it refuses.

A new rank should train as in a new optimiser. So each entry of the state with the parameter's shape needs a value at a
new rank:

- ZERO: moments of gradients. A new optimiser begins with zero too, and zero moments move no weight.
- WEIGHT: copies and averages of the weights. They begin at the weight of the new rank; zero would pull it to zero.
- the key of a parameter group: constants of the optimiser, such as Rprop's first step size, which is the learning rate.

When a layer is turned to another basis of its ranks (:mod:`lorank.lora.basis`), each entry needs a way to turn:

- as a gradient (exact), as the square of a gradient, as a weight, or as the square of a step of the weight;
- not at all: what an entry says about single numbers is lost in another basis. It begins anew, as for a new rank.

The count of steps is one number per parameter, so new ranks share it with the old ones. An optimiser outside the table
is tried on copies after its first step (:mod:`lorank.lora.optimizer_trial`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorank.errors import OptimizerStateError

ZERO, WEIGHT = "zero", "weight"


class Turns(Enum):
    """How an entry of the state turns with the basis of a layer's ranks."""

    AS_GRADIENT = auto()
    AS_SQUARE = auto()
    AS_MAXIMUM = auto()
    """The largest size of gradients: the root of the turned squares."""
    AS_WEIGHT = auto()
    AS_STEP_SQUARE = auto()
    BEGINS_ANEW = auto()


class Entry(NamedTuple):
    """What lorank knows about one entry of an optimiser's state.

    Args:
        start: its value at a new rank: ZERO, WEIGHT, or the key of the parameter group that has the value.
        turns: how it turns with the basis.
        centre: for squares, the entry with the mean that the optimiser subtracts from them. Then their difference, the
            variance, turns as squares do, and so stays positive.
    """

    start: str
    turns: Turns
    centre: str | None = None


Rule = Mapping[str, Entry]
"""The entries of an optimiser's state, by name."""

_FIRST = Entry(ZERO, Turns.AS_GRADIENT)
_SECOND = Entry(ZERO, Turns.AS_SQUARE)
_COPY = Entry(WEIGHT, Turns.AS_WEIGHT)
_ADAM: Rule = {"exp_avg": _FIRST, "exp_avg_sq": _SECOND, "max_exp_avg_sq": _SECOND}
_ONLY_SECOND = ("Adagrad", "RMSprop")  # of bitsandbytes: the first tensor of their state holds squares

# Package → class → rule.
_RULES: Mapping[str, Mapping[str, Rule]] = {
    "torch": {
        "Adadelta": {"square_avg": _SECOND, "acc_delta": Entry(ZERO, Turns.AS_STEP_SQUARE)},
        "Adafactor": {"row_var": _SECOND, "col_var": _SECOND},
        "Adagrad": {"sum": Entry("initial_accumulator_value", Turns.AS_SQUARE)},
        "Adam": _ADAM,
        "AdamW": _ADAM,
        "Adamax": {"exp_avg": _FIRST, "exp_inf": Entry(ZERO, Turns.AS_MAXIMUM)},
        "ASGD": {"ax": _COPY},
        "Muon": {"momentum_buffer": _FIRST},
        "NAdam": _ADAM,
        "RAdam": _ADAM,
        # its momentum adds up steps, gradients that are divided by their size already
        "RMSprop": {
            "square_avg": Entry(ZERO, Turns.AS_SQUARE, centre="grad_avg"),
            "momentum_buffer": Entry(ZERO, Turns.AS_WEIGHT),
            "grad_avg": _FIRST,
        },
        "Rprop": {"prev": Entry(ZERO, Turns.BEGINS_ANEW), "step_size": Entry("lr", Turns.BEGINS_ANEW)},
        "SGD": {"momentum_buffer": _FIRST},
    },
    "transformers": {
        "Adafactor": {
            "exp_avg": Entry(ZERO, Turns.AS_WEIGHT),  # a mean of steps, see transformers' Adafactor
            "exp_avg_sq": _SECOND,
            "exp_avg_sq_row": _SECOND,
            "exp_avg_sq_col": _SECOND,
        },
    },
    "bitsandbytes": {
        f"{paged}{kind}{bits}": {"state1": _SECOND if kind in _ONLY_SECOND else _FIRST, "state2": _SECOND}
        for kind in ("Adagrad", "Adam", "AdamW", "AdEMAMix", "LAMB", "LARS", "Lion", "RMSprop", "SGD")
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    },
    "torchao": {f"{kind}{bits}": _ADAM for kind in ("Adam", "AdamW") for bits in ("8bit", "4bit", "Fp8")}
    | {"_AdamW": _ADAM},
    "deepspeed": dict.fromkeys(("DeepSpeedCPUAdam", "FusedAdam", "DeepSpeedCPULion", "FusedLion"), _ADAM),
    "schedulefree": {f"{kind}ScheduleFree": {"z": _COPY, "exp_avg_sq": _SECOND} for kind in ("AdamW", "RAdam", "SGD")},
}

_STEP_SIZE = "estimates one step size for all ranks from the distance to their first weights"
_PROJECTED = "keeps its moments in a projection of the gradient that has no entry per rank"
_IN_BACKWARD = "moves the weights in the backward pass, so that lorank cannot see its steps"
_DENSE = "needs sparse gradients, and those of LoRA are dense"
_REFUSED: Mapping[str, str] = {
    "LBFGS": "keeps one history of all parameters together, which has no entry per rank",
    "SparseAdam": _DENSE,
    "Prodigy": _STEP_SIZE,
    "ProdigyPlusScheduleFree": _STEP_SIZE,
    "DAdaptAdam": _STEP_SIZE,
    "DAdaptAdaGrad": _STEP_SIZE,
    "DAdaptAdan": _STEP_SIZE,
    "DAdaptLion": _STEP_SIZE,
    "DAdaptSGD": _STEP_SIZE,
    "CPUOffloadOptimizer": "keeps copies of the weights, and their state, on the CPU",
    "LoraFAOptimizer": "keeps its state under the names of modules, and the gradient of B depends on A",
    "GaLoreAdamW": _PROJECTED,
    "GaLoreAdamW8bit": _PROJECTED,
    "GaLoreAdafactor": _PROJECTED,
    "APOLLOAdamW": _PROJECTED,
    "Lomo": _IN_BACKWARD,
    "AdaLomo": _IN_BACKWARD,
    "LayerWiseDummyOptimizer": _IN_BACKWARD,
}

ADVICE = "Use AdamW, SGD, Adafactor, 8-bit AdamW or schedule-free AdamW"


def find_rule(optimizer: torch.optim.Optimizer) -> Rule | None:
    """The rule for the optimiser's class; None for an unknown class, also for a subclass of a known one.

    An optimiser that only stands for another one, whose state it shows, has that one in its attribute ``stands_for``.
    """
    kind = type(getattr(optimizer, "stands_for", optimizer))
    if kind.__name__ in _RULES["schedulefree"]:  # often copied into a project of one's own
        return _RULES["schedulefree"][kind.__name__]
    return _RULES.get(kind.__module__.split(".")[0], {}).get(kind.__name__)


def copies_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a known optimiser keeps copies or averages of the weights in its state."""
    return any(entry.start == WEIGHT for entry in (find_rule(optimizer) or {}).values())


def check_zero_rule(optimizer: torch.optim.Optimizer) -> None:
    """Checks an optimiser whose state at new ranks can only be zero.

    Raises:
        OptimizerStateError: its rule has another value, or there is no rule for it.
    """
    rule = find_rule(optimizer)
    if rule is None or any(entry.start != ZERO for entry in rule.values()):
        raise OptimizerStateError(
            f"DeepSpeed's ZeRO is used with {type(optimizer).__name__}, and lorank cannot begin its state for new "
            "ranks there. Use AdamW, Adam, Lion or SGD"
        )


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Checks, before training, what an optimiser's class and attributes tell.

    Args:
        optimizer: the torch optimiser, without accelerate's wrapper.
        parameters: the parameters whose ranks will change.

    Raises:
        OptimizerStateError: its state cannot follow a change of ranks, or it steps another optimiser, which has the
            state.
    """
    name = type(optimizer).__name__
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            raise OptimizerStateError(f"{name} {_REFUSED[kind.__name__]}. {ADVICE}")
    ids = {id(parameter) for parameter in parameters}
    inner = [(label, found) for label, found in _inner_optimizers(optimizer) if _holds(found, ids)]
    if not inner:
        return
    label, found = inner[0]
    if len(inner) > 1:
        remedy = "Use one optimiser, with parameter groups for its parts"
    elif "SAM" in name:  # it restores the weights before the step of the inner optimiser
        remedy = f"Attach to that one: attach(model, optimizer.{label}, …)"
    else:
        remedy = f"Train with the {type(found).__name__} alone"
    raise OptimizerStateError(
        f"{name} steps another optimiser, the {type(found).__name__} in its attribute {label}, which has the state of "
        f"the LoRA parameters. {remedy}"
    )


def _inner_optimizers(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """The optimisers in an optimiser's attributes, also in lists and mappings, with the attributes' names."""
    for label, value in vars(optimizer).items():
        items: Any = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for item in (value, *items):
            if isinstance(item, torch.optim.Optimizer) and item is not optimizer:
                yield label, item


def _holds(optimizer: torch.optim.Optimizer, ids: set[int]) -> bool:
    return any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"])
