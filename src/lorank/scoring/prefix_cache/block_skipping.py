"""Starts a model's forward pass in the middle of its blocks.

The model's own forward always runs, so embeddings, masks, rotary angles, the final norm and the head are computed by
the model's own code. Only the blocks before the ablated one are skipped: each returns its input, and the last one
returns its stored output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from lorank.scoring.ablation_variants import IncompatibleError
from lorank.scoring.microbatch import repeat
from lorank.scoring.prefix_cache.block_tracing import Block, Trace, hidden_state_of

T = TypeVar("T")


class _PrefixComplete(BaseException):
    """Ends a forward pass after the last block of the prefix.

    It is derived from ``BaseException``, so that ``except Exception`` in a model's code does not catch it.
    """


@dataclass
class Prefix:
    """The stored outputs of the first blocks of a model.

    Attributes:
        done: the number of blocks in the prefix.
        carried: by the block's index, the output of the last block of the prefix and of the last block of every chain
            before it. Complete outputs are stored: T5's first block computes a bias that each block passes to the next.
    """

    done: int = 0
    carried: dict[int, Any] = field(default_factory=dict)


class BlockSkipper:
    """Runs a model's forward pass from the middle. Usable inside :meth:`patched` only.

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
        """Inside, each block has a ``forward`` that may skip it."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block.module, self._forward(index, block)))
            yield

    def _forward(self, index: int, block: Block) -> Callable[..., Any]:
        original = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < self._prefix.done:
                if index in self._prefix.carried:
                    return _repeat_output(self._prefix.carried[index], self._copies)
                return block.pass_through(hidden_state_of(args, kwargs))
            output = original(*args, **kwargs)
            if self._until is not None:
                last = index == self._until - 1
                if last or block.last:
                    self._reached[index] = _repeat_output(output, 1)
                if last:
                    raise _PrefixComplete
            return output

        return forward

    def run(self, forward: Callable[[], T], prefix: Prefix, copies: int = 1) -> T:
        """``forward()``, with the blocks of ``prefix`` skipped.

        Args:
            forward: runs the model on its batch.
            prefix: the blocks to skip, and their outputs for one copy of the batch.
            copies: how many times ``forward`` repeats the batch along the first axis.
        """
        self._prefix, self._copies = prefix, copies
        try:
            return forward()
        finally:
            self._prefix, self._copies = Prefix(), 1

    def advance(self, forward: Callable[[], object], prefix: Prefix, to: int) -> Prefix:
        """The prefix of ``to`` blocks, computed from a shorter prefix. The forward pass ends after these blocks."""
        if to <= prefix.done:
            return prefix
        self._until, self._reached = to, {}
        try:
            self.run(forward, prefix)
        except _PrefixComplete:
            pass
        finally:
            self._until = None
        reached = self._reached
        if to - 1 not in reached:
            raise IncompatibleError("its blocks did not run in the same order twice")
        kept = {index: hidden for index, hidden in prefix.carried.items() if self.blocks[index].last}
        return Prefix(to, {**kept, **reached})


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Sets an instance-level ``forward``. Afterwards restores the previous one, if any (accelerate sets one)."""
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
    """A block's output for the repeated batch.

    Values whose first axis does not count samples, as the hidden state's (n, …) does, are not repeated: all samples
    share them. The result is always a copy, because the model may change it in place and the stored output is reused.
    """
    if isinstance(output, Tensor):
        return repeat(output, copies)
    rows = len(output[0])
    return tuple(
        repeat(value, copies) if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for value in output
    )
