"""Starting a model's forward in the middle of its blocks.

The model's own forward always runs, so embeddings, masks, rotary angles, the final norm and the head stay the model's
own code. Only the blocks before the one in question are skipped: each hands its input through, and the last one returns
what it once computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from lorank.scoring.microbatch import repeat
from lorank.scoring.prefix_cache.block_tracing import Block, Trace, hidden_of
from lorank.scoring.variants import Unsuited

T = TypeVar("T")


class _Reached(BaseException):
    """Ends a forward of which only the beginning was needed. No ``Exception``, so that no model's code catches it."""


@dataclass
class Prefix:
    """How far a model has been computed once and for all.

    Attributes:
        done: how many blocks.
        carried: what the last of them returned, and the last of every chain before, by the block's index. Whole: T5's
            first block computes a bias that each block hands on to the next.
    """

    done: int = 0
    carried: dict[int, Any] = field(default_factory=dict)


class Skipper:
    """Runs a model's forward from the middle. Usable inside :meth:`patched` only.

    Args:
        trace: the blocks.
    """

    def __init__(self, trace: Trace) -> None:
        self.blocks = trace.blocks
        self._prefix = Prefix()
        self._copies = 1
        self._until: int | None = None
        self._reached: dict[int, Any] = {}

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Gives each block a ``forward`` that may skip it, and takes it away again."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced(block.module, self._forward(index, block)))
            yield

    def _forward(self, index: int, block: Block) -> Callable[..., Any]:
        original = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < self._prefix.done:
                if index in self._prefix.carried:
                    return _repeat_output(self._prefix.carried[index], self._copies)
                return block.pass_through(hidden_of(args, kwargs))
            output = original(*args, **kwargs)
            if self._until is not None:
                last = index == self._until - 1
                if last or block.last:
                    self._reached[index] = _repeat_output(output, 1)
                if last:
                    raise _Reached
            return output

        return forward

    def run(self, forward: Callable[[], T], prefix: Prefix, copies: int = 1) -> T:
        """``forward()``, with the blocks of ``prefix`` skipped.

        Args:
            forward: runs the model on its batch, repeated ``copies`` times along the first axis.
        """
        self._prefix, self._copies = prefix, copies
        try:
            return forward()
        finally:
            self._prefix, self._copies = Prefix(), 1

    def advance(self, forward: Callable[[], object], prefix: Prefix, to: int) -> Prefix:
        """The prefix of ``to`` blocks, computed from a shorter one; the forward ends there."""
        if to <= prefix.done:
            return prefix
        self._until, self._reached = to, {}
        try:
            self.run(forward, prefix)
        except _Reached:
            pass
        finally:
            self._until = None
        reached = self._reached
        if to - 1 not in reached:
            raise Unsuited("its blocks did not run in the same order twice")
        kept = {index: hidden for index, hidden in prefix.carried.items() if self.blocks[index].last}
        return Prefix(to, {**kept, **reached})


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """An instance-level ``forward``; one that was there before (accelerate sets such) comes back."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


def _repeat_output(output: Any, copies: int) -> Any:
    """A block's output for the batch repeated; beside the hidden state, (n, …), it may hold what all samples share.

    Always a copy: the model may change what it is given in place, and a carried state is used again.
    """
    if isinstance(output, Tensor):
        return repeat(output, copies)
    rows = len(output[0])
    return tuple(
        repeat(value, copies) if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for value in output
    )
