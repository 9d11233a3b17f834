"""DeepSpeed's ZeRO-1, -2 and -3: changes of rank with parameters of fixed shape (:mod:`lorank.lora.pool`).

ZeRO has float32 copies of the parameters, and their moments, sharded over the processes. Their shapes are fixed, so the
model's parameters are padded (:func:`lorank.reserve_`). :class:`ZeroOptimizer` copies the live ranks:

    fetch    the r live ranks of ZeRO's copies → the pools' A and B, and their moments → this optimiser's state
    store    A and B, padded with zeros → ZeRO's copies and the model's parameters; the moments likewise

Between fetch and store everything is as without DeepSpeed: the same code resizes the live A and B and their moments.
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
from lorank.lora import AdapterLayer, AdapterLayers, check_zero_rule, padded, unwrap_optimizer
from lorank.training.checkpoint.rank_state import STATE_KEY
from lorank.training.parallel.backend import Backend
from lorank.training.run_state import RunState

SUPPORTED = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


class ZeroBackend(Backend):
    """The backend for DeepSpeed's ZeRO. The run uses a torch optimiser of the live ranks, :class:`ZeroOptimizer`.

    Raises:
        OptimizerStateError: DeepSpeed's optimiser contains no torch optimiser.
        LorankError: the configuration of DeepSpeed is not supported.
    """

    optimizer: ZeroOptimizer

    def __init__(self, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> None:
        self.optimizer = ZeroOptimizer(layers, zero_of(optimizer))
        self.lockstep = self.optimizer.sharded
        self._layers = layers
        self._stored = False  # whether the run has written to DeepSpeed's copies

    @classmethod
    def supports(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        return zero_of(optimizer) is not None

    @classmethod
    def inner(cls, model: nn.Module) -> nn.Module:
        inside = getattr(model, "module", None)
        return inside if type(model).__module__.startswith("deepspeed.") and isinstance(inside, nn.Module) else model

    def on_start(self, run: RunState) -> None:
        if self.lockstep and run.allocator.own_backward:
            raise LorankError(
                f"{type(run.allocator).__name__} runs its own backward passes, for which ZeRO-3 does not gather the "
                "parameters: use ZeRO-2, or a method without (ALoRA with scores='exact', BalancedLoRA with "
                "init='default')"
            )
        if run.allocator.moves_ranks:
            check_zero_rule(self.optimizer.inner)
        self.optimizer.take_over()

    def before_step(self, run: RunState) -> None:
        self.optimizer.read_rates()
        if run.allocator.sees_gradients and not run.finished:
            self.optimizer.fetch()
            self.optimizer.fetch_gradients()

    def before_read(self, run: RunState) -> None:
        self.optimizer.fetch()

    def after_resize(self, run: RunState) -> None:
        self.optimizer.store()
        self._stored = True

    def after_restore(self, run: RunState) -> None:
        if self._stored:
            self.optimizer.store()

    def on_end(self, run: RunState) -> None:
        self.optimizer.close()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        with _gathered(self._layers):
            yield


def param_groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups into which a checkpoint's parameter groups are loaded."""
    zero = zero_of(optimizer)
    return (unwrap_optimizer(optimizer) if zero is None else unwrap_optimizer(zero.optimizer)).param_groups


def zero_of(optimizer: Any) -> Any:
    """DeepSpeed's optimiser, also inside accelerate's wrapper; None if ``optimizer`` is another optimiser."""
    inner = optimizer
    while inner is not None and not _is_deepspeed(inner):
        inner = None if isinstance(inner, torch.optim.Optimizer) and "state" in vars(inner) else _inner_optimizer(inner)
    return inner


def _inner_optimizer(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", None)


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.runtime")


class ZeroOptimizer(torch.optim.Optimizer):
    """A torch optimiser of the layers' live A and B, whose step is the step of DeepSpeed's ZeRO optimiser.

    When the DeepSpeed engine calls ``step`` of ZeRO's optimiser, it calls this ``step`` and so its hooks.

    Args:
        layers: the LoRA layers, with pools.
        zero: DeepSpeed's optimiser.

    Raises:
        LorankError: the kind of DeepSpeed's optimiser is not supported, parameters are in fp16, or a layer has no pool.
    """

    def __init__(self, layers: AdapterLayers, zero: Any) -> None:
        _check_supported(layers, zero)
        self._layers, self._zero = layers, zero
        self._zero_step: Callable[..., Any] = zero.step
        self._zero_load: Callable[..., Any] = zero.load_state_dict
        super().__init__([weight for layer in layers.values() for weight in (layer.A, layer.B)], self._learning_rates())
        self._handle: Any = None
        self._read_rank_state()

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded (ZeRO-3), so that a forward pass needs all processes at once."""
        return any(hasattr(weight, "ds_id") for layer in self._layers.values() for weight in layer.stored)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimiser inside ZeRO's."""
        return unwrap_optimizer(self._zero.optimizer)

    @property
    def stands_for(self) -> torch.optim.Optimizer:
        """The optimiser whose moments are this one's state (:func:`lorank.lora.optimizer_rules.find_rule`)."""
        return self.inner

    @property
    def rate_groups(self) -> list[dict[str, Any]]:
        """The parameter groups whose learning rate moves the adapter: those of the optimiser inside ZeRO's."""
        return [self._adapter_group()]

    def read_rates(self) -> None:
        """Copies the learning rate of the optimiser inside ZeRO's, and what its schedule states."""
        self.param_groups[0].update(self._learning_rates())

    def take_over(self) -> None:
        """Makes the engine call this optimiser's ``step``, and save this optimiser's rank state in its checkpoints."""
        self._zero.step, self._zero.load_state_dict = self.step, self._load_and_run_hooks  # on the instance
        self._zero.optimizer.param_groups[0].pop(STATE_KEY, None)
        self._handle = self._zero.optimizer.register_state_dict_post_hook(self._add_rank_state)

    def close(self) -> None:
        """Restores the engine's own ``step`` and ``load_state_dict``."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            for name in ("step", "load_state_dict"):
                vars(self._zero).pop(name, None)

    def step(self, closure: Any = None) -> Any:
        """Runs ZeRO's step, between this optimiser's hooks.

        Fetched gradients are stored first, because a method may have changed them.
        """
        self.store_gradients()
        return self._zero_step() if closure is None else self._zero_step(closure)

    @torch.no_grad()
    def fetch(self) -> None:
        """Copies A, B and moments of the live ranks from ZeRO's copies. All processes must call it together.

        Raises:
            LorankError: ZeRO's copies contain more ranks than the layers have.
        """
        moments = self._moment_names()
        for layer, live, stored, axis in self._weight_pairs():
            gathered = _get_weight(stored)
            dead = gathered.narrow(axis, live.shape[axis], gathered.shape[axis] - live.shape[axis])
            if dead.any():
                raise LorankError(
                    f"DeepSpeed's copy of {layer.name} has more ranks than the layer, which has {layer.rank}: were "
                    "other weights or another checkpoint loaded? Load checkpoints with engine.load_checkpoint, "
                    "including optimiser states"
                )
            live.data = _live_ranks(gathered, axis, live)
            self.state[live] = {key: _live_ranks(_get_moment(stored, key), axis, live) for key in moments}

    @torch.no_grad()
    def store(self) -> None:
        """Copies A, B and moments to ZeRO's copies, and A and B to the model. All processes must call it together."""
        moments = self._moment_names()
        for layer, live, stored, axis in self._weight_pairs():
            assert layer.pool is not None
            size = layer.pool.capacity
            _set_weight(stored, padded(live, axis, size))
            for key in moments:
                _set_moment(stored, padded(self.state[live][key], axis, size), key)
        with _gathered(self._layers):
            for layer, live, stored, axis in self._weight_pairs():
                assert layer.pool is not None
                stored.data.copy_(padded(live, axis, layer.pool.capacity))

    @torch.no_grad()
    def fetch_gradients(self) -> None:
        """Copies the gradients of the live ranks, averaged over processes and before DeepSpeed clips them."""
        from deepspeed.utils import safe_get_full_grad

        for _, live, stored, axis in self._weight_pairs():
            live.grad = _live_ranks(safe_get_full_grad(stored), axis, live).to(live)

    @torch.no_grad()
    def store_gradients(self) -> None:
        """Copies fetched gradients back to ZeRO, and sets them to None here."""
        for layer, live, stored, axis in self._weight_pairs():
            assert layer.pool is not None
            if live.grad is not None:
                _set_gradient(stored, padded(live.grad, axis, layer.pool.capacity))
            live.grad = None

    def _weight_pairs(self) -> Iterator[tuple[AdapterLayer, nn.Parameter, nn.Parameter, int]]:
        """Yields (layer, live weight, stored parameter of the model, rank axis)."""
        for layer in self._layers.values():
            for live, stored, axis in zip((layer.A, layer.B), layer.stored, (0, 1), strict=True):
                yield layer, live, stored, axis

    def _moment_names(self) -> list[str]:
        """The names of the moments in the optimiser inside ZeRO; empty before the first step."""
        for flat, state in self._zero.optimizer.state.items():
            found = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
            if found:
                self._link_moments()
                return found
        return []

    def _link_moments(self) -> None:
        """Renews the links by which ZeRO-1 and -2 find a parameter's moments. Loading a checkpoint makes them stale."""
        if hasattr(self._zero, "_hp_optimizer_states_linked"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _learning_rates(self) -> dict[str, Any]:
        group = self._adapter_group()
        return {key: group[key] for key in ("lr", "initial_lr", "max_lr") if key in group}

    def _adapter_group(self) -> dict[str, Any]:
        """The parameter group of the optimiser inside ZeRO whose flat parameters contain those of the adapter."""
        groups: list[dict[str, Any]] = self._zero.optimizer.param_groups
        own = {id(weight) for layer in self._layers.values() for weight in layer.stored}
        # ZeRO-3 divides the parameters of a group into subgroups, and has a table from one to the other.
        parts = getattr(self._zero, "bit16_groups", None) or getattr(self._zero, "fp16_groups", [])
        group_of = getattr(self._zero, "sub_group_to_group_id", None)
        for index, parameters in enumerate(parts):
            if any(id(parameter) in own for parameter in parameters):
                return groups[index if group_of is None else group_of[index]]
        return groups[0]

    def _add_rank_state(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        own: dict[str, Any] = {}
        for hook in self._optimizer_state_dict_post_hooks.values():
            hook(self, {"state": {}, "param_groups": [own]})
        state_dict["param_groups"][0].update(own)

    def _read_rank_state(self) -> None:
        saved = self._zero.optimizer.param_groups[0].get(STATE_KEY)
        if saved is not None:
            self.param_groups[0][STATE_KEY] = saved

    def _load_and_run_hooks(self, *arguments: Any, **options: Any) -> Any:
        found = self._zero_load(*arguments, **options)
        self._read_rank_state()
        self._zero.optimizer.param_groups[0].pop(STATE_KEY, None)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
        return found


def _live_ranks(gathered: Tensor, axis: int, live: Tensor) -> Tensor:
    return gathered.narrow(axis, 0, live.shape[axis]).clone()


def _get_weight(stored: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    gathered: Tensor = safe_get_full_fp32_param(stored)
    return gathered.view(getattr(stored, "ds_shape", stored.shape))


def _get_moment(stored: nn.Parameter, key: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    gathered: Tensor = safe_get_full_optimizer_state(stored, key)
    return gathered.view(getattr(stored, "ds_shape", stored.shape))


def _set_weight(stored: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(stored, "ds_id"):
        safe_set_local_fp32_param(stored, _own_shard(stored, value))
    else:
        safe_set_full_fp32_param(stored, value)


def _set_moment(stored: nn.Parameter, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(stored, "ds_id"):
        safe_set_local_optimizer_state(stored, _own_shard(stored, value), key)
    else:
        safe_set_full_optimizer_state(stored, value, key)


def _set_gradient(stored: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    if hasattr(stored, "ds_id"):
        safe_set_local_grad(stored, _own_shard(stored, value))
    else:
        safe_set_full_grad(stored, value)


def _own_shard(stored: Any, value: Tensor) -> Tensor:
    """This process's shard of a ZeRO-3 parameter. DeepSpeed's own functions fail for shards of unequal length."""
    size = stored.ds_tensor.numel()
    group = stored.ds_process_group
    flat = F.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
    return flat.narrow(0, size * dist.get_rank(group), size)


def _gathered(layers: AdapterLayers) -> AbstractContextManager[Any]:
    """A context in which every process has the complete stored parameters of these layers, also under ZeRO-3.

    Afterwards, all processes have what process 0 has written. All processes must enter the context together.
    """
    stored = [weight for layer in layers.values() for weight in layer.stored if hasattr(weight, "ds_id")]
    if not stored:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(stored, modifier_rank=0)  # type: ignore[no-any-return]  # deepspeed is untyped


def _check_supported(layers: AdapterLayers, zero: Any) -> None:
    if type(zero).__name__ not in SUPPORTED:
        raise LorankError(
            f"DeepSpeed made a {type(zero).__name__} for this configuration, which lorank does not support. Use ZeRO "
            "stage 1, 2 or 3 in float32, or stage 2 or 3 in bf16"
        )
    for name, layer in layers.items():
        if layer.pool is None:
            raise LorankError(
                f"DeepSpeed gives parameters a fixed shape, and no ranks were reserved in {name}: call "
                "lorank.reserve_(model, max_rank=…) before deepspeed.initialize (docs/distributed.md)"
            )
        if layer.stored[0].dtype == torch.float16:
            raise LorankError("fp16 under DeepSpeed skips steps and scales gradients: train in bf16 or float32")
