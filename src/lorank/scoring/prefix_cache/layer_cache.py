"""Starts a variant in the middle of its block: layers that do not depend on the ablated layer are not run again.

One recorded pass of a block under the background stores the output of each adapted layer and of its frozen map W. In a
variant of one layer of the block,

- layers called before the ablated layer do not depend on it, and return their stored output;
- layers called with the same tensor as the ablated layer (k and v beside q, up beside gate) also return it;
- the ablated layer adds its ranks, with the variant's gates, to the stored output of its frozen map.

So a variant of q computes no projection until the attention has finished, and a variant of down computes none at all.
All other code of the model runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorank.lora.layer import AdapterLayers
from lorank.scoring.microbatch import repeat
from lorank.scoring.prefix_cache.block_skipping import replaced_forward


@dataclass(frozen=True)
class _Call:
    """The single call of a layer in the recorded pass.

    Attributes:
        order: the index of the call among the calls of all layers.
        x: the input tensor itself, to compare by identity.
        version: how often the input had been written to. A later write may depend on the ablated layer.
        output: a copy of the layer's output.
        frozen: a copy of the output of the layer's frozen map. None: the map was not called exactly once, or the layer
            also uses W otherwise (DoRA).
    """

    order: int
    x: Tensor
    version: int
    output: Tensor
    frozen: Tensor | None


class LayerCache:
    """Stored outputs of the layers of the block in which variants start. Usable inside :meth:`patched` only.

    Args:
        per_sample: the layers whose input has the samples on its first axis. Only their outputs can be stacked.
    """

    def __init__(self, layers: AdapterLayers, per_sample: frozenset[str]) -> None:
        # Wrappers of parameters may be inside each other, and their base computes with the updated parameter.
        self.layers = {name: layer for name, layer in layers.items() if not layer.is_expert}
        self.per_sample = per_sample
        self._calls: dict[str, _Call] = {}
        self._called: list[str] | None = None  # while a pass is recorded, the layers in the order of their calls
        self._frozen: dict[str, list[Tensor | None]] = {}
        self._ablated: str | None = None
        self._copies = 1
        self._ablated_input: Tensor | None = None  # the input of the ablated layer in the running variant
        self._ablated_input_version = 0

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Inside, each layer has a ``forward`` that may return its stored output."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(replaced_forward(layer.module, self._forward(name, layer.module.forward)))
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the forward pass of the background that runs inside. It replaces the previous record."""
        self._calls, self._called, self._frozen = {}, [], {}
        try:
            with ExitStack() as stack:
                for name, layer in self.layers.items():
                    if not layer.uses_dora:  # DoRA scales the output of W and reads W itself
                        base = layer.module.get_base_layer()
                        stack.enter_context(replaced_forward(base, self._recording_forward(name, base.forward)))
                yield
        finally:
            for name in {name for name in self._called if self._called.count(name) > 1}:
                self._calls.pop(name, None)
            self._called, self._frozen = None, {}

    @contextmanager
    def ablating(self, name: str, copies: int) -> Iterator[None]:
        """Inside, a forward pass of variants of layer ``name`` runs, ``copies`` of them stacked."""
        call = self._calls.get(name)
        if call is None or (copies > 1 and name not in self.per_sample):
            yield
            return
        self._ablated, self._copies, self._ablated_input = name, copies, None
        try:
            with ExitStack() as stack:
                if call.frozen is not None:
                    base = self.layers[name].module.get_base_layer()
                    stack.enter_context(replaced_forward(base, self._cached_forward(call.frozen, base.forward)))
                yield
        finally:
            self._ablated, self._copies, self._ablated_input = None, 1, None

    def forget(self) -> None:
        """Deletes the recorded pass."""
        self._calls = {}

    def _forward(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
            if self._called is not None:
                order, version = len(self._called), _version(x)
                self._called.append(name)
                output = original(*args, **kwargs)
                if x is not None and isinstance(output, Tensor):
                    frozen = self._frozen.get(name, [])
                    known = frozen[0] if len(frozen) == 1 else None
                    self._calls[name] = _Call(order, x, version, repeat(output, 1), known)
                return output
            if name == self._ablated:
                self._ablated_input, self._ablated_input_version = x, _version(x)
            elif self._ablated is not None and x is not None:
                known = self._known(name, x)
                if known is not None:
                    return repeat(known, self._copies)
            return original(*args, **kwargs)

        return forward

    def _known(self, name: str, x: Tensor) -> Tensor | None:
        """The output of a layer that is called with ``x`` in a variant, or None if it may differ from the record."""
        call, ablated = self._calls.get(name), self._calls[self._ablated or ""]
        if call is None or (self._copies > 1 and name not in self.per_sample):
            return None
        if self._ablated_input is None:
            return call.output if call.order < ablated.order else None
        same = call.x is ablated.x and call.version == ablated.version and x is self._ablated_input
        return call.output if same and _version(x) == self._ablated_input_version else None

    def _recording_forward(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            # Copied now, because the layer may change this tensor in place afterwards.
            self._frozen.setdefault(name, []).append(repeat(output, 1) if isinstance(output, Tensor) else None)
            return output

        return forward

    def _cached_forward(self, known: Tensor, original: Callable[..., Any]) -> Callable[..., Any]:
        served = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal served
            if served:
                return original(*args, **kwargs)
            served = True
            return repeat(known, self._copies)

        return forward


def _version(x: Tensor | None) -> int:
    """How often the tensor has been written to; 0 if unknown."""
    return 0 if x is None or x.is_inference() else x._version
