"""Second moments of what goes through every rank, summed up in the backward passes of training.

For one module let z = A x, (r,) per token, and ẑ = ∂loss/∂z = s · g ⊙ Bᵀ ∂loss/∂y. Over the tokens that the loss
depends on (those whose ẑ is not zero up to rounding):

    Z = Σ z zᵀ        D = Σ ẑ ẑᵀ        both (r, r)

They are the Gramians of balanced truncation (:mod:`lorank.scoring.balanced`). The fused functions have z and ẑ at hand
in their backward pass. Elsewhere a hook on ``lora_A`` sees z, and a hook on z its gradient. Padding has ẑ = 0 and does
not count.

In a convolution every position of an image is a token. With groups, a rank has one z per group, and each of them counts
as a token: Z is their mean and D the sum over them, so all groups turn to one basis. Experts have one Z and one D each
(:mod:`lorank.lora.expert_watch`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorank.lora.expert_watch import ExpertWatch
from lorank.lora.gramian_sums import LayerGramians
from lorank.lora.layer import AdapterLayer
from lorank.lora.variants.convolution import channels_by_rank
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.gated import GatedLora


class Gramians:
    """The sums of all layers. They are collected from construction until :meth:`remove`.

    Args:
        layers: the LoRA layers, by name.
        in_training_mode: whether only forward passes in training mode count, so that evaluations change nothing.

    Attributes:
        sums: the sums of each layer.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], *, in_training_mode: bool = True) -> None:
        self._layers = layers
        self._handles: list[Any] = []
        self.sums = {
            name: LayerGramians(partial(_rank_of, layer), in_training_mode=in_training_mode)
            for name, layer in layers.items()
        }
        self.watch()

    @property
    def collecting(self) -> bool:
        """Whether backward passes are added. It costs about a per cent of a training step."""
        return any(own.collecting for own in self.sums.values())

    @collecting.setter
    def collecting(self, collecting: bool) -> None:
        for own in self.sums.values():
            own.collecting = collecting

    def watch(self) -> None:
        """Watches every layer in its present form. Call it again when layers are fused or unfused."""
        self._unwatch()
        for name, layer in self._layers.items():
            own, fused = self.sums[name], _fused(layer)
            if fused is not None:
                self._handles.append(_FusedWatch(fused, own))
            # Also where the layer is fused, for the calls that fall back to PEFT's formula.
            if layer.is_expert:
                self._handles.append(ExpertWatch(layer, own))
            elif layer.is_embedding:
                self._handles.append(_EmbeddingWatch(layer.module, own))
            else:
                watch = _Watch(own, partial(_by_rank, layer=layer))
                self._handles.append(layer.module.lora_A[layer.adapter].register_forward_hook(watch))

    def clear(self) -> None:
        """Forgets all sums."""
        for own in self.sums.values():
            own.clear()

    def unscale(self, factor: float) -> None:
        """Removes the factor that a gradient scaler has put on the loss. > 0."""
        for own in self.sums.values():
            if own.D is not None:
                own.D = own.D / factor**2

    def remove(self) -> None:
        """Ends collecting, and removes everything from the layers."""
        self.collecting = False
        self._unwatch()
        self.clear()

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _FusedWatch:
    """Makes a fused forward collect for ``own``. Afterwards it collects for what it did before, as a run does."""

    def __init__(self, fused: FusedLora, own: LayerGramians) -> None:
        self._fused, self._before = fused, fused.gramians
        fused.gramians = own

    def remove(self) -> None:
        self._fused.gramians = self._before


class _Watch:
    """A forward hook of ``lora_A``, whose output is z.

    Args:
        own: the sums.
        by_rank: turns z to (r, n).
    """

    def __init__(self, own: LayerGramians, by_rank: Callable[[Tensor], Tensor]) -> None:
        self._own, self._by_rank = own, by_rank

    def __call__(self, module: nn.Module, _: tuple[Any, ...], z: Any) -> None:
        if self._own.wants(module) and isinstance(z, Tensor) and z.requires_grad:
            add_gradient_of(z, self._own, self._by_rank)


class _EmbeddingWatch:
    """Watches the LoRA of an embedding. PEFT computes its z by a method of the layer, and not by a module."""

    def __init__(self, module: nn.Module, own: LayerGramians) -> None:
        self._module, self._own = module, own
        self._before = vars(module).get("_embed")  # another watch, or a user's own
        self._embed = module._embed
        module._embed = self  # type: ignore[assignment]  # on the instance

    def __call__(self, ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
        z: Tensor = self._embed(ids, weight, **options)  # type: ignore[operator]  # PEFT is untyped
        if self._own.wants(self._module) and z.requires_grad and z.shape[-1] == self._own.rank():
            add_gradient_of(z, self._own, _last_axis)
        return z

    def remove(self) -> None:
        if self._before is None:
            vars(self._module).pop("_embed", None)
        else:
            self._module._embed = self._before  # on the instance


def add_gradient_of(z: Tensor, own: LayerGramians, by_rank: Callable[[Tensor], Tensor]) -> None:
    """Adds z and its gradient to the sums when the backward pass reaches it. ``by_rank`` turns them to (≥ r, n)."""
    if not z.numel():  # a module of rank 0
        return
    value = z.detach()

    def add(dz: Tensor) -> None:
        rank = own.rank()  # with a pool, the rows after them belong to dead ranks
        own.add(by_rank(value)[:rank], by_rank(dz)[:rank])

    z.register_hook(add)  # type: ignore[no-untyped-call]  # untyped in torch


def _by_rank(values: Tensor, layer: AdapterLayer) -> Tensor:
    """The output of a layer's ``lora_A`` as (R, n)."""
    return channels_by_rank(values, layer.module) if layer.is_convolution else _last_axis(values)


def _last_axis(values: Tensor) -> Tensor:
    """(…, R) as (R, n)."""
    return values.reshape(values.shape[:-1].numel(), values.shape[-1]).T


def _rank_of(layer: AdapterLayer) -> int:
    return layer.rank


def _fused(layer: AdapterLayer) -> FusedLora | None:
    variant = layer.module.lora_variant.get(layer.adapter)
    own = variant.replaced if isinstance(variant, GatedLora) else variant
    return own if isinstance(own, FusedLora) else None
