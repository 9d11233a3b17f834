"""Starting a variant in the middle of its block: what ran there before the ablated layer is not run again.

One recorded pass of a block under the background keeps what each adapted layer in it, and its frozen map, gave. In a
variant of one of them,

- layers called before it see nothing of it, and return what they gave;
- layers called with the very tensor that it was called with (k and v beside q, up beside gate) do so too;
- it adds its ranks, gated otherwise, to what its frozen map gave.

So a variant of q computes no projection before the attention is through, and one of down computes none at all.
Everything else is the model's own code, and runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorank.lora.layer import AdapterLayers
from lorank.scoring.microbatch import repeat
from lorank.scoring.prefix_cache.block_skipping import replaced


@dataclass(frozen=True)
class _Call:
    """A layer's one call in the recorded pass.

    Attributes:
        turn: when, among the layers' calls.
        x: what it was called with: the tensor itself, to be recognised by.
        version: how often that had been written to; what was written may depend on the ablated layer.
        output: a copy of what it gave.
        frozen: a copy of what its frozen map gave; None: that was called otherwise, or is needed for more (DoRA).
    """

    turn: int
    x: Tensor
    version: int
    output: Tensor
    frozen: Tensor | None


class LayerCache:
    """The layers of the block in which variants begin. Usable inside :meth:`patched` only.

    Args:
        per_sample: the layers whose input has the samples on its first axis; what others gave cannot be stacked.
    """

    def __init__(self, layers: AdapterLayers, per_sample: frozenset[str]) -> None:
        self.layers, self.per_sample = layers, per_sample
        self._calls: dict[str, _Call] = {}
        self._seen: list[str] | None = None  # layers in the order they are called, while a pass is recorded
        self._frozen: dict[str, list[Tensor | None]] = {}
        self._ablated: str | None = None
        self._copies = 1
        self._given: Tensor | None = None  # what the ablated layer was called with in the variant that runs
        self._given_version = 0

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Gives each layer a ``forward`` that may return what is known, and takes it away again."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(replaced(layer.module, self._forward(name, layer.module.forward)))
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The forward that runs inside is the background's, and is remembered in place of the one before."""
        self._calls, self._seen, self._frozen = {}, [], {}
        try:
            with ExitStack() as stack:
                for name, layer in self.layers.items():
                    if not layer.min_rank:  # DoRA scales what W gives, and asks for W itself
                        base = layer.module.get_base_layer()
                        stack.enter_context(replaced(base, self._watched(name, base.forward)))
                yield
        finally:
            for name in {name for name in self._seen if self._seen.count(name) > 1}:
                self._calls.pop(name, None)
            self._seen, self._frozen = None, {}

    @contextmanager
    def ablating(self, name: str, copies: int) -> Iterator[None]:
        """The forward that runs inside is of variants of one layer, ``copies`` of them stacked."""
        call = self._calls.get(name)
        if call is None or (copies > 1 and name not in self.per_sample):
            yield
            return
        self._ablated, self._copies, self._given = name, copies, None
        try:
            with ExitStack() as stack:
                if call.frozen is not None:
                    base = self.layers[name].module.get_base_layer()
                    stack.enter_context(replaced(base, self._once(call.frozen, base.forward)))
                yield
        finally:
            self._ablated, self._copies, self._given = None, 1, None

    def forget(self) -> None:
        """No pass is remembered."""
        self._calls = {}

    def _forward(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
            if self._seen is not None:
                turn, version = len(self._seen), _version(x)
                self._seen.append(name)
                output = original(*args, **kwargs)
                if x is not None and isinstance(output, Tensor):
                    frozen = self._frozen.get(name, [])
                    known = frozen[0] if len(frozen) == 1 else None
                    self._calls[name] = _Call(turn, x, version, repeat(output, 1), known)
                return output
            if name == self._ablated:
                self._given, self._given_version = x, _version(x)
            elif self._ablated is not None and x is not None:
                known = self._known(name, x)
                if known is not None:
                    return repeat(known, self._copies)
            return original(*args, **kwargs)

        return forward

    def _known(self, name: str, x: Tensor) -> Tensor | None:
        """What a layer that is called with ``x`` in a variant gives, if that is certain."""
        call, ablated = self._calls.get(name), self._calls[self._ablated or ""]
        if call is None or (self._copies > 1 and name not in self.per_sample):
            return None
        if self._given is None:
            return call.output if call.turn < ablated.turn else None
        same = call.x is ablated.x and call.version == ablated.version and x is self._given
        return call.output if same and _version(x) == self._given_version else None

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            # Now, since the layer may go on to add to it in place.
            self._frozen.setdefault(name, []).append(repeat(output, 1) if isinstance(output, Tensor) else None)
            return output

        return forward

    def _once(self, known: Tensor, original: Callable[..., Any]) -> Callable[..., Any]:
        served = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal served
            if served:
                return original(*args, **kwargs)
            served = True
            return repeat(known, self._copies)

        return forward


def _version(x: Tensor | None) -> int:
    """How often it has been written to."""
    return 0 if x is None or x.is_inference() else x._version
