"""DeepSpeed's ZeRO-1, -2 and -3: ranks move in a pool of fixed shape.

ZeRO has copies of the parameters in float32, and their moments, in parts over the processes. Their shapes are fixed, so
the model's layers have room reserved (:func:`lorank.reserve_`), and :class:`ZeroOptimizer` moves what is alive:

    fetch    the r live ranks of the copies → the layers' own A and B, and their moments → this optimiser's state
    store    A and B, with zeros behind → the copies and the model's parameters; their moments likewise

In between everything is as without DeepSpeed: the same code resizes the same small tensors and their moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.errors import LorankError
from lorank.lora import AdapterLayer, AdapterLayers, padded, unwrap_optimizer
from lorank.training.checkpoint.rank_state import STATE_KEY
from lorank.training.parallel.backend import Backend
from lorank.training.run_state import RunState

ZERO = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


class ZeroBackend(Backend):
    """DeepSpeed's ZeRO: its optimiser is seen through a torch optimiser of the live ranks, :class:`ZeroOptimizer`.

    Raises:
        OptimizerStateError: there is no optimiser inside.
        LorankError: a DeepSpeed that is not supported.
    """

    optimizer: ZeroOptimizer

    def __init__(self, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> None:
        self.optimizer = ZeroOptimizer(layers, zero_of(optimizer))
        self.lockstep = self.optimizer.sharded
        self._layers = layers

    @classmethod
    def serves(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        return zero_of(optimizer) is not None

    @classmethod
    def inner(cls, model: nn.Module) -> nn.Module:
        inside = getattr(model, "module", None)
        return inside if type(model).__module__.startswith("deepspeed.") and isinstance(inside, nn.Module) else model

    def on_start(self, run: RunState) -> None:
        if self.lockstep and run.allocator.own_backward:
            raise LorankError(
                f"{type(run.allocator).__name__} makes backward passes of its own, for which ZeRO-3 does not gather "
                "what they need: use ZeRO-2, or scores from forward passes (ALoRA with scores='exact')"
            )
        self.optimizer.take_over()

    def before_step(self, run: RunState) -> None:
        if run.allocator.sees_gradients and not run.finished:
            self.optimizer.fetch()
            self.optimizer.fetch_gradients()

    def before_read(self, run: RunState) -> None:
        self.optimizer.fetch()

    def after_resize(self, run: RunState) -> None:
        self.optimizer.store()

    def on_end(self, run: RunState) -> None:
        self.optimizer.close()

    @contextmanager
    def whole(self) -> Iterator[None]:
        with _gathered(self._layers):
            yield


def param_groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups that a checkpoint's are loaded into."""
    zero = zero_of(optimizer)
    return (unwrap_optimizer(optimizer) if zero is None else unwrap_optimizer(zero.optimizer)).param_groups


def zero_of(optimizer: Any) -> Any:
    """DeepSpeed's optimiser, also inside accelerate's wrapper of it; None where there is none."""
    inner = optimizer
    while inner is not None and not _is_deepspeed(inner):
        inner = None if isinstance(inner, torch.optim.Optimizer) and "state" in vars(inner) else _within(inner)
    return inner


def _within(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", None)


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.runtime")


class ZeroOptimizer(torch.optim.Optimizer):
    """A ZeRO optimiser as a run sees one: a torch optimiser of the layers' live A and B.

    When the engine steps ZeRO's optimiser, this one steps, and with it its hooks; the step itself is ZeRO's.

    Args:
        layers: the LoRA layers, in pools.
        zero: DeepSpeed's optimiser.

    Raises:
        LorankError: another of DeepSpeed's optimisers, fp16, or layers without a pool.
    """

    def __init__(self, layers: AdapterLayers, zero: Any) -> None:
        _check(layers, zero)
        self._layers, self._zero = layers, zero
        self._step: Callable[..., Any] = zero.step
        self._load: Callable[..., Any] = zero.load_state_dict
        super().__init__([weight for layer in layers.values() for weight in (layer.A, layer.B)], self._schedule())
        self._handle: Any = None
        self._take_loaded()

    @property
    def sharded(self) -> bool:
        """Whether parameters are in parts (ZeRO-3), so that a forward pass needs all processes at once."""
        return any(hasattr(weight, "ds_id") for layer in self._layers.values() for weight in layer.stored)

    def take_over(self) -> None:
        """From now on the engine steps this optimiser, and its checkpoints hold what this one saves."""
        self._zero.step, self._zero.load_state_dict = self.step, self._load_and_tell  # on the instance
        self._zero.optimizer.param_groups[0].pop(STATE_KEY, None)
        self._handle = self._zero.optimizer.register_state_dict_post_hook(self._save_with)

    def close(self) -> None:
        """The engine steps as it did before."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            for name in ("step", "load_state_dict"):
                vars(self._zero).pop(name, None)

    def step(self, closure: Any = None) -> Any:
        """ZeRO's own step, between this optimiser's hooks. Gradients that a method has changed are stored first."""
        self.param_groups[0].update(self._schedule())
        self.store_gradients()
        return self._step() if closure is None else self._step(closure)

    @torch.no_grad()
    def fetch(self) -> None:
        """A, B and moments of the live ranks, from ZeRO's copies. All processes at once."""
        moments = self._moments()
        for layer, shadow, stored, axis in self._weights():
            whole = _get_weight(stored)
            dead = whole.narrow(axis, shadow.shape[axis], whole.shape[axis] - shadow.shape[axis])
            if dead.any():
                raise LorankError(
                    f"DeepSpeed's copy of {layer.name} has more than the {layer.rank} ranks that are there: were other "
                    "weights or another checkpoint loaded? Load checkpoints with engine.load_checkpoint, optimiser "
                    "states included"
                )
            shadow.data = _live(whole, axis, shadow)
            self.state[shadow] = {key: _live(_get_moment(stored, key), axis, shadow) for key in moments}

    @torch.no_grad()
    def store(self) -> None:
        """The inverse of :meth:`fetch`, and the model's parameters get the same. All processes at once."""
        moments = self._moments()
        for layer, shadow, stored, axis in self._weights():
            assert layer.pool is not None
            size = layer.pool.capacity
            _set_weight(stored, padded(shadow, axis, size))
            for key in moments:
                _set_moment(stored, padded(self.state[shadow][key], axis, size), key)
        with _gathered(self._layers):
            for layer, shadow, stored, axis in self._weights():
                assert layer.pool is not None
                stored.data.copy_(padded(shadow, axis, layer.pool.capacity))

    @torch.no_grad()
    def fetch_gradients(self) -> None:
        """The gradients of the live ranks, averaged over processes; DeepSpeed has not clipped them yet."""
        from deepspeed.utils import safe_get_full_grad

        for _, shadow, stored, axis in self._weights():
            shadow.grad = _live(safe_get_full_grad(stored), axis, shadow).to(shadow)

    @torch.no_grad()
    def store_gradients(self) -> None:
        """The inverse of :meth:`fetch_gradients`, where gradients were fetched; they are gone afterwards."""
        for layer, shadow, stored, axis in self._weights():
            assert layer.pool is not None
            if shadow.grad is not None:
                _set_gradient(stored, padded(shadow.grad, axis, layer.pool.capacity))
            shadow.grad = None

    def _weights(self) -> Iterator[tuple[AdapterLayer, nn.Parameter, nn.Parameter, int]]:
        """Layer, live weight, the model's parameter, rank axis."""
        for layer in self._layers.values():
            for shadow, stored, axis in zip((layer.A, layer.B), layer.stored, (0, 1), strict=True):
                yield layer, shadow, stored, axis

    def _moments(self) -> list[str]:
        """What the optimiser inside ZeRO keeps per number; nothing before the first step."""
        for flat, state in self._zero.optimizer.state.items():
            found = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
            if found:
                self._link_moments()
                return found
        return []

    def _link_moments(self) -> None:
        """ZeRO-1 and -2 find a parameter's moments by links, which are of before where a checkpoint was loaded."""
        if hasattr(self._zero, "_hp_optimizer_states_linked"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _schedule(self) -> dict[str, Any]:
        group = self._zero.optimizer.param_groups[0]
        return {key: group[key] for key in ("lr", "initial_lr") if key in group}

    def _save_with(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        own: dict[str, Any] = {}
        for hook in self._optimizer_state_dict_post_hooks.values():
            hook(self, {"state": {}, "param_groups": [own]})
        state_dict["param_groups"][0].update(own)

    def _take_loaded(self) -> None:
        saved = self._zero.optimizer.param_groups[0].get(STATE_KEY)
        if saved is not None:
            self.param_groups[0][STATE_KEY] = saved

    def _load_and_tell(self, *arguments: Any, **options: Any) -> Any:
        found = self._load(*arguments, **options)
        self._take_loaded()
        self._zero.optimizer.param_groups[0].pop(STATE_KEY, None)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
        return found


def _live(whole: Tensor, axis: int, shadow: Tensor) -> Tensor:
    return whole.narrow(axis, 0, shadow.shape[axis]).clone()


def _get_weight(stored: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Tensor = safe_get_full_fp32_param(stored)
    return whole.view(getattr(stored, "ds_shape", stored.shape))


def _get_moment(stored: nn.Parameter, key: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    whole: Tensor = safe_get_full_optimizer_state(stored, key)
    return whole.view(getattr(stored, "ds_shape", stored.shape))


def _set_weight(stored: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(stored, "ds_id"):
        safe_set_local_fp32_param(stored, _part(stored, value))
    else:
        safe_set_full_fp32_param(stored, value)


def _set_moment(stored: nn.Parameter, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(stored, "ds_id"):
        safe_set_local_optimizer_state(stored, _part(stored, value), key)
    else:
        safe_set_full_optimizer_state(stored, value, key)


def _set_gradient(stored: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    if hasattr(stored, "ds_id"):
        safe_set_local_grad(stored, _part(stored, value))
    else:
        safe_set_full_grad(stored, value)


def _part(stored: Any, value: Tensor) -> Tensor:
    """This process's part of a ZeRO-3 parameter. DeepSpeed's own functions fail where parts are not equally long."""
    size = stored.ds_tensor.numel()
    group = stored.ds_process_group
    flat = F.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
    return flat.narrow(0, size * dist.get_rank(group), size)


def _gathered(layers: AdapterLayers) -> AbstractContextManager[Any]:
    """Inside, the model's parameters of these layers are whole in every process, also under ZeRO-3.

    What process 0 writes into them is in all of them afterwards. All processes at once.
    """
    stored = [weight for layer in layers.values() for weight in layer.stored if hasattr(weight, "ds_id")]
    if not stored:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(stored, modifier_rank=0)  # type: ignore[no-any-return]  # deepspeed is untyped


def _check(layers: AdapterLayers, zero: Any) -> None:
    if type(zero).__name__ not in ZERO:
        raise LorankError(
            f"DeepSpeed made a {type(zero).__name__} for this configuration, whose copies of the parameters lorank "
            "does not know. Use ZeRO stage 1, 2 or 3 in float32, or stage 2 or 3 in bf16"
        )
    for name, layer in layers.items():
        if layer.pool is None:
            raise LorankError(
                f"DeepSpeed gives parameters a fixed shape, and no room was reserved for the ranks of {name}: call "
                "lorank.reserve_(model, max_rank=…) before DeepSpeed sees the model (docs/distributed.md)"
            )
        if layer.stored[0].dtype == torch.float16:
            raise LorankError("fp16 under DeepSpeed skips steps and scales gradients: train in bf16 or float32")
