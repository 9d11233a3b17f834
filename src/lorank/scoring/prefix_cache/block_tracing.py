"""Finds the blocks that a model runs one after another, by tracing one forward pass.

This does not depend on a model's class or attribute names. A chain of blocks is a list of modules that are each called
once, in order. Each receives the hidden state that the previous module returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation_variants import IncompatibleError


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        module: the module that can be skipped.
        extra: the number of values after the hidden state in the returned tuple; None: the block returns no tuple.
        last: whether the block is the last of its chain, so that no block takes its output as input.
    """

    module: nn.Module
    extra: int | None
    last: bool

    def pass_through(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """The output of the block when it is skipped.

        The values after the hidden state are None: only the next block uses them, and it is skipped as well.
        """
        return hidden if self.extra is None else (hidden, *[None] * self.extra)


@dataclass(frozen=True)
class Trace:
    """The result of tracing one forward pass.

    Attributes:
        blocks: all blocks in the order in which they ran. Several chains (an encoder's and a decoder's) are joined.
        start: per layer, the number of blocks that had finished when the layer first ran. All of them can be skipped
            when the layer is ablated.
        per_sample: the layers whose input has the samples on its first axis, so that they can take a gate per sample.
        head: whether the module that computes logits ran once, on (samples, tokens, width).
        tokens: the number of positions per sample of the largest hidden state.
        dtypes: the dtypes in which blocks and layers computed.
    """

    blocks: tuple[Block, ...]
    start: dict[str, int]
    per_sample: frozenset[str]
    head: bool
    tokens: int
    dtypes: frozenset[torch.dtype]


def hidden_state_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden state with which a block is called: its first argument, or the argument ``hidden_states``."""
    return args[0] if args else kwargs.get("hidden_states")


@dataclass
class _Chain:
    """A container whose members may be a chain of blocks, with the calls recorded so far."""

    members: list[nn.Module]
    valid: bool = True
    ran: int = 0
    entered: list[int] = field(default_factory=list)  # times
    left: list[int] = field(default_factory=list)
    extras: list[int | None] = field(default_factory=list)
    hidden: Tensor | None = None  # the input of the running member, later its output
    tokens: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)

    def enter(self, index: int, hidden: Any, time: int) -> None:
        self.valid &= index == self.ran == len(self.left) and _is_hidden_state(hidden)
        if self.valid and index:
            self.valid = _is_same_tensor(hidden, self.hidden)
        self.ran += 1
        self.entered.append(time)
        self.hidden = hidden if self.valid else None

    def leave(self, output: Any, time: int) -> None:
        extra = None
        if type(output) is tuple and output:
            output, extra = output[0], len(output) - 1
        shape = None if self.hidden is None else self.hidden.shape
        self.valid &= isinstance(output, Tensor) and output.shape == shape
        self.left.append(time)
        self.extras.append(extra)
        self.hidden = output if self.valid else None
        if self.hidden is not None:
            self.dtypes.add(self.hidden.dtype)
            self.tokens = max(self.tokens, self.hidden[0, ..., 0].numel())

    @property
    def complete(self) -> bool:
        return self.valid and len(self.left) == len(self.members)


def _is_hidden_state(x: Any) -> bool:
    """Whether ``x`` can be a hidden state, (samples, …, width)."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.numel() > 0


def _is_same_tensor(new: Tensor, old: Tensor | None) -> bool:
    """Whether a block's input is the previous block's output. A hook may have moved it to another device."""
    return old is not None and (new is old or (new.shape == old.shape and torch.equal(new, old.to(new.device))))


@contextmanager
def trace_blocks(
    model: nn.Module, layers: AdapterLayers, rows: int, head: nn.Module | None
) -> Iterator[Callable[[], Trace]]:
    """Traces the one forward pass that runs inside. Yields a function that returns the trace afterwards.

    Args:
        rows: the number of samples in this forward pass.
        head: the module that computes logits. When variants run, it receives labelled positions instead of samples.

    Raises:
        IncompatibleError: raised by the yielded function if no chain of blocks was found.
    """
    clock = 0

    def tick() -> int:
        nonlocal clock
        clock += 1
        return clock

    chains = [
        _Chain(list(module.children()))
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    ]
    first: dict[str, tuple[int, torch.Size]] = {}  # layer → time of its first call, and its input's shape
    heads: list[tuple[int, torch.Size]] = []  # time and input shape of each call of the head
    dtypes: set[torch.dtype] = set()

    def watch(chain: _Chain, index: int, member: nn.Module, hooks: ExitStack) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chain.enter(index, hidden_state_of(args, kwargs), tick())

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            chain.leave(output, tick())

        hooks.callback(member.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(member.register_forward_hook(leave, with_kwargs=True).remove)

    def watch_layer(name: str, hooks: ExitStack) -> None:
        def call(_: nn.Module, args: tuple[Any, ...]) -> None:
            first.setdefault(name, (tick(), _shape(args)))

        def done(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                dtypes.add(output.dtype)  # under autocast it differs from the dtype of the hidden states

        hooks.callback(layers[name].module.register_forward_pre_hook(call).remove)
        hooks.callback(layers[name].module.register_forward_hook(done).remove)

    def call_head(_: nn.Module, args: tuple[Any, ...]) -> None:
        heads.append((tick(), _shape(args)))

    def read_trace() -> Trace:
        head_time = heads[0][0] if heads else clock + 1
        chosen = _select_chains([c for c in chains if c.complete and c.left[-1] < head_time], layers)
        if not chosen:
            raise IncompatibleError(
                "it has no chain of blocks, each called once and taking what the one before it returned"
            )
        inside = {id(m): i for i, member in enumerate(_members(chosen)) for m in member.modules()}
        ends = sorted(time for chain in chosen for time in chain.left)
        start, per_sample = {}, set()
        for name, layer in layers.items():
            block = inside.get(id(layer.module))
            if name not in first:  # it did not run now but may run in a variant: skip only the blocks before its own
                start[name] = 0 if block is None else block
                continue
            time, shape = first[name]
            start[name] = sum(end < time for end in ends)
            # An input with two axes inside a block may be (tokens selected by a router, width). Its first axis then
            # does not count samples, even if its length is the number of samples.
            samples = shape[:1] == (rows,) and (len(shape) > 2 or block is None)
            if samples and not layer.is_embedding and not layer.is_expert and time < head_time:
                per_sample.add(name)
        head_fits = len(heads) == 1 and len(heads[0][1]) == 3 and heads[0][1][0] == rows
        computed_in = frozenset(dtypes.union(*(chain.dtypes for chain in chosen)))
        tokens = max(chain.tokens for chain in chosen)
        return Trace(tuple(_blocks(chosen)), start, frozenset(per_sample), head_fits, tokens, computed_in)

    with ExitStack() as hooks:
        # The head's hook is called first: if the head is itself a layer, the layer's time is then after the head's.
        if head is not None:
            hooks.callback(head.register_forward_pre_hook(call_head, prepend=True).remove)
        for chain in chains:
            for index, member in enumerate(chain.members):
                watch(chain, index, member, hooks)
        for name in layers:
            watch_layer(name, hooks)
        yield read_trace


def _shape(args: tuple[Any, ...]) -> torch.Size:
    return args[0].shape if args and isinstance(args[0], Tensor) else torch.Size()


def _members(chains: list[_Chain]) -> Iterator[nn.Module]:
    return (member for chain in chains for member in chain.members)


def _blocks(chains: list[_Chain]) -> Iterator[Block]:
    for chain in chains:
        for index, (member, extra) in enumerate(zip(chain.members, chain.extras, strict=True)):
            yield Block(member, extra, index == len(chain.members) - 1)


def _select_chains(chains: list[_Chain], layers: AdapterLayers) -> list[_Chain]:
    """The chains that ran one after the other, in this order. Of nested chains, those with the most adapter layers."""
    modules = {id(layer.module) for layer in layers.values()}

    def adapted(chain: _Chain) -> int:
        return sum(id(m) in modules for member in chain.members for m in member.modules())

    chosen: list[_Chain] = []
    for chain in sorted(chains, key=adapted, reverse=True):
        if all(chain.left[-1] < other.entered[0] or chain.entered[0] > other.left[-1] for other in chosen):
            chosen.append(chain)
    return sorted(chosen, key=lambda chain: chain.entered[0])
