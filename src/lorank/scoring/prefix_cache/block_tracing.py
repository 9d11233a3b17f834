"""Finding the blocks that a model runs one after another, by watching one forward.

No model's class or attribute names are known here. A chain of blocks is a list of modules of which each was called
once, in order, with the hidden state that the one before it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.variants import Unsuited


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        module: what is skipped.
        extra: how many values follow the hidden state in the tuple that it returns; None: there is no tuple.
        last: no block follows that takes this one's output as its input.
    """

    module: nn.Module
    extra: int | None
    last: bool

    def pass_through(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """What it returns when skipped. The values after the hidden state concern the next block, skipped as well."""
        return hidden if self.extra is None else (hidden, *[None] * self.extra)


@dataclass(frozen=True)
class Trace:
    """What one forward showed.

    Attributes:
        blocks: all blocks in the order they ran; of several chains (an encoder's and a decoder's) one after the other.
        start: per layer, how many blocks were through when it first ran: all of them can be skipped when it is ablated.
        per_sample: the layers whose input has the samples on its first axis, so that a gate per sample fits.
        head: the module that makes logits ran once, on (samples, tokens, width).
        tokens: positions per sample of the largest hidden state.
        dtypes: the dtypes that blocks and layers computed in.
    """

    blocks: tuple[Block, ...]
    start: dict[str, int]
    per_sample: frozenset[str]
    head: bool
    tokens: int
    dtypes: frozenset[torch.dtype]


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden state that a block is called with: its first argument, or the one of that name."""
    return args[0] if args else kwargs.get("hidden_states")


@dataclass
class _Chain:
    """A container whose members may be a chain of blocks; what is known of it so far."""

    members: list[nn.Module]
    valid: bool = True
    ran: int = 0
    entered: list[int] = field(default_factory=list)  # times
    left: list[int] = field(default_factory=list)
    extras: list[int | None] = field(default_factory=list)
    hidden: Tensor | None = None  # what the member now running was given, then what it returned
    tokens: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)

    def enter(self, index: int, hidden: Any, time: int) -> None:
        self.valid &= index == self.ran == len(self.left) and _is_hidden_state(hidden)
        if self.valid and index:
            self.valid = _same(hidden, self.hidden)
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
    """(samples, …, width)"""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.numel() > 0


def _same(new: Tensor, old: Tensor | None) -> bool:
    """Whether a block takes exactly what the one before it returned. A hook may have moved it to another device."""
    return old is not None and (new is old or (new.shape == old.shape and torch.equal(new, old.to(new.device))))


@contextmanager
def tracing(
    model: nn.Module, layers: AdapterLayers, rows: int, head: nn.Module | None
) -> Iterator[Callable[[], Trace]]:
    """Watches the one forward that runs inside; the function it gives then says what was seen.

    Args:
        rows: samples in that forward.
        head: the module that makes logits, which will see chosen positions only and no samples.

    Raises (the function):
        Unsuited: no chain of blocks was found.
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
    heads: list[tuple[int, torch.Size]] = []  # the same for each call of the head
    dtypes: set[torch.dtype] = set()

    def watch(chain: _Chain, index: int, member: nn.Module, hooks: ExitStack) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chain.enter(index, hidden_of(args, kwargs), tick())

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            chain.leave(output, tick())

        hooks.callback(member.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(member.register_forward_hook(leave, with_kwargs=True).remove)

    def watch_layer(name: str, hooks: ExitStack) -> None:
        def call(_: nn.Module, args: tuple[Any, ...]) -> None:
            first.setdefault(name, (tick(), _shape(args)))

        def done(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                dtypes.add(output.dtype)  # under autocast, not that of the hidden states

        hooks.callback(layers[name].module.register_forward_pre_hook(call).remove)
        hooks.callback(layers[name].module.register_forward_hook(done).remove)

    def call_head(_: nn.Module, args: tuple[Any, ...]) -> None:
        heads.append((tick(), _shape(args)))

    def seen() -> Trace:
        head_time = heads[0][0] if heads else clock + 1
        chosen = _choose([c for c in chains if c.complete and c.left[-1] < head_time], layers)
        if not chosen:
            raise Unsuited("it has no chain of blocks, each called once and taking what the one before it returned")
        inside = {id(m): i for i, member in enumerate(_members(chosen)) for m in member.modules()}
        ends = sorted(time for chain in chosen for time in chain.left)
        start, per_sample = {}, set()
        for name, layer in layers.items():
            block = inside.get(id(layer.module))
            if name not in first:  # it did not run now, but might in a variant: skip only what surely ran before
                start[name] = 0 if block is None else block
                continue
            time, shape = first[name]
            start[name] = sum(end < time for end in ends)
            # Two axes inside a block may be (tokens picked by a router, width): not samples, whatever their number.
            samples = shape[:1] == (rows,) and (len(shape) > 2 or block is None)
            if samples and not layer.is_embedding and time < head_time:
                per_sample.add(name)
        head_fits = len(heads) == 1 and len(heads[0][1]) == 3 and heads[0][1][0] == rows
        computed_in = frozenset(dtypes.union(*(chain.dtypes for chain in chosen)))
        tokens = max(chain.tokens for chain in chosen)
        return Trace(tuple(_blocks(chosen)), start, frozenset(per_sample), head_fits, tokens, computed_in)

    with ExitStack() as hooks:
        # The head's hook comes first, so that a head which is a layer itself is seen to run after it.
        if head is not None:
            hooks.callback(head.register_forward_pre_hook(call_head, prepend=True).remove)
        for chain in chains:
            for index, member in enumerate(chain.members):
                watch(chain, index, member, hooks)
        for name in layers:
            watch_layer(name, hooks)
        yield seen


def _shape(args: tuple[Any, ...]) -> torch.Size:
    return args[0].shape if args and isinstance(args[0], Tensor) else torch.Size()


def _members(chains: list[_Chain]) -> Iterator[nn.Module]:
    return (member for chain in chains for member in chain.members)


def _blocks(chains: list[_Chain]) -> Iterator[Block]:
    for chain in chains:
        for index, (member, extra) in enumerate(zip(chain.members, chain.extras, strict=True)):
            yield Block(member, extra, index == len(chain.members) - 1)


def _choose(chains: list[_Chain], layers: AdapterLayers) -> list[_Chain]:
    """The chains that ran one after the other, in that order; of nested ones, those with the most adapter layers."""
    modules = {id(layer.module) for layer in layers.values()}

    def adapted(chain: _Chain) -> int:
        return sum(id(m) in modules for member in chain.members for m in member.modules())

    chosen: list[_Chain] = []
    for chain in sorted(chains, key=adapted, reverse=True):
        if all(chain.left[-1] < other.entered[0] or chain.entered[0] > other.left[-1] for other in chosen):
            chosen.append(chain)
    return sorted(chosen, key=lambda chain: chain.entered[0])
