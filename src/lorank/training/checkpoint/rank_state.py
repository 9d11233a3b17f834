"""The rank state of a run: everything that an exact resume needs besides weights and optimiser moments.

The rank state is saved inside the optimiser's ``state_dict``, in the first parameter group. So every loop that saves
and loads its optimiser also saves and loads the rank state. It consists of plain types and tensors. A file of weights
contains plain LoRA; the rank state contains the form in which layers are trained (gates, heads).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from lorank.allocators import Allocator
from lorank.errors import ResumeError
from lorank.lora import AdapterLayers, HeadGroups, plan_for_rank, resize_, restore_layout_
from lorank.training.checkpoint.base_fingerprint import check_same_base
from lorank.training.checkpoint.state_schema import check_seal, sealed
from lorank.training.run_state import RunState

VERSION = 4
STATE_KEY = "lorank"
"""The key of the rank state in an optimiser's first parameter group."""


def rank_state(run: RunState) -> dict[str, Any]:
    """The rank state, sealed with a hash of its content (:mod:`lorank.training.checkpoint.state_schema`)."""
    state = {
        "version": VERSION,
        "step": run.step,
        "allocations": run.allocations,
        "allocator": run.allocator.describe(),
        "seed": run.info.seed,
        "finished": run.finished,
        "initial_ranks": dict(run.info.initial_ranks),
        **_layers_state(run.layers),
        "base": run.base,
        "first_lr": run.first_lr,
        "highest_lr": run.highest_lr,
        "state": {name: tensor.detach().clone() for name, tensor in run.memory.items()},
    }
    return sealed(state)


def restore_layers_(run: RunState, state: Mapping[str, Any]) -> None:
    """Gives the layers the form and the ranks of the state. The loaded optimiser has moments of these shapes."""
    restore_layout_(run.layers, saved_heads(state))
    _resize_plain_layers_(run.layers, state["ranks"])


def restore_progress_(run: RunState, state: Mapping[str, Any]) -> None:
    """Restores gates, the method's memory and the counts, for layers that have the ranks of the state.

    Each tensor of the memory is moved to the device on which :meth:`~lorank.allocators.Allocator.start` created the
    tensor of that name, because a checkpoint may have been loaded to another device.
    """
    _load_gates_(run.layers, state["gated"])
    default_device = next(iter(run.layers.values())).A.device
    devices = {name: tensor.device for name, tensor in run.memory.items()}
    run.memory = {
        name: tensor.detach().clone().to(devices.get(name, default_device)) for name, tensor in state["state"].items()
    }
    run.step = state["step"]
    run.allocations = state["allocations"]
    run.finished = state["finished"]
    run.first_lr, run.highest_lr = state["first_lr"], state["highest_lr"]


def _defaults(allocator: Allocator) -> dict[str, Any]:
    """The defaults of the allocator's settings that have a plain one."""
    if not dataclasses.is_dataclass(allocator):
        return {}
    return {
        setting.name: setting.default
        for setting in dataclasses.fields(allocator)
        if setting.default is not dataclasses.MISSING
    }


def check_resumable(state: Mapping[str, Any], run: RunState) -> None:
    """Checks that a saved rank state is undamaged and belongs to this run. Nothing is changed.

    Raises:
        ResumeError: the state is damaged, or is of another version, method, setting, seed, model or budget.
    """
    layers, info = run.layers, run.info
    if not isinstance(state, Mapping):
        raise ResumeError(
            f"the saved rank state is a {type(state).__name__}, expected a mapping: the optimiser's file is damaged. "
            "Resume from another checkpoint"
        )
    if state.get("version") != VERSION:
        raise ResumeError(
            f"the saved rank state has version {state.get('version')!r}, but this lorank reads version {VERSION}: "
            "resume with the lorank that wrote it"
        )
    check_seal(state)
    current_settings: dict[str, Any] = {**run.allocator.describe(), "seed": info.seed}
    saved_settings: dict[str, Any] = {**state["allocator"], "seed": state["seed"]}
    if saved_settings.get("method") == current_settings.get("method"):
        # A setting that the lorank that saved it did not have yet: its default is what that lorank did.
        saved_settings = {**_defaults(run.allocator), **saved_settings}
    differing = sorted(
        key
        for key in current_settings.keys() | saved_settings.keys()
        if current_settings.get(key) != saved_settings.get(key)
    )
    if differing:
        differences = "; ".join(
            f"{key}: saved {saved_settings.get(key)!r}, now {current_settings.get(key)!r}" for key in differing
        )
        raise ResumeError(f"the checkpoint is of another run ({differences}). Resume with the settings of that run")
    shapes = {name: (layer.d_in, layer.d_out) for name, layer in layers.items()}
    if {name: tuple(shape) for name, shape in state["shapes"].items()} != shapes:
        raise ResumeError(
            f"the checkpoint is of another model: its {len(state['shapes'])} adapted modules differ in name or "
            f"shape from the {len(shapes)} here. Load the base model that the run was started with, and adapt the "
            "same modules"
        )
    max_ranks = {name: max(min(shape), info.initial_ranks.get(name, 0)) for name, shape in shapes.items()}
    if state["ranks"].keys() != max_ranks.keys() or any(
        rank > max_ranks[name] for name, rank in state["ranks"].items()
    ):
        raise ResumeError(
            "the saved rank state has ranks that its modules cannot have: it was not written by a run. Resume from "
            "another checkpoint"
        )
    check_same_base(state["base"], layers)
    if state["initial_ranks"] != info.initial_ranks:
        saved, now = sum(state["initial_ranks"].values()), sum(info.initial_ranks.values())
        raise ResumeError(
            f"the checkpoint's run began with another budget: {saved} ranks in {len(shapes)} modules, here {now}. "
            "Make the model as in that run, with get_peft_model and the same LoraConfig, not from the checkpoint"
        )


def _layers_state(layers: AdapterLayers) -> dict[str, Any]:
    """The part of a rank state about the layers."""
    return {
        "shapes": {name: (layer.d_in, layer.d_out) for name, layer in layers.items()},
        "ranks": layers.ranks,
        "heads": _heads_state(layers),
        "gated": _gated_state(layers),
    }


def _gated_state(layers: AdapterLayers) -> dict[str, Any]:
    """Learned gates, and B without the gates folded in, which a file of weights lacks. Empty without gates."""
    gates = layers.gates
    if gates is None:
        return {}
    return {
        "gates": gates.values.clone(),
        # The checkpoint of DeepSpeed's optimiser contains the B of layers with a pool, without the gates folded in.
        "B": {name: layer.B.detach().clone() for name, layer in layers.items() if layer.pool is None},
    }


def _load_gates_(layers: AdapterLayers, saved: Mapping[str, Any]) -> None:
    """The inverse of :func:`_gated_state`, for layers of the same ranks."""
    if not saved:
        layers.drop_gates()
        return
    layers.learn_gates(saved["gates"])
    with torch.no_grad():
        for name, B in saved["B"].items():
            layers[name].B.copy_(B)


def _heads_state(layers: AdapterLayers) -> dict[str, dict[str, Any]]:
    """For each layer in per-head form, its heads and the rank of each head."""
    return {
        name: {**asdict(layer.groups), "ranks": list(layer.head_ranks)}
        for name, layer in layers.items()
        if layer.groups is not None
    }


def saved_heads(state: Mapping[str, Any]) -> dict[str, tuple[HeadGroups, list[int]]]:
    """The layers in per-head form of a saved rank state, as arguments of :func:`lorank.lora.restore_layout_`."""
    heads: Mapping[str, Mapping[str, Any]] = state.get("heads", {})
    return {name: (HeadGroups(h["kind"], h["count"], h["size"]), h["ranks"]) for name, h in heads.items()}


def _resize_plain_layers_(layers: AdapterLayers, ranks: Mapping[str, int]) -> None:
    """Resizes plain layers to ``ranks``. :func:`lorank.lora.restore_layout_` has resized those in per-head form."""
    plain = {name: layer for name, layer in layers.items() if layer.groups is None}
    resize_(layers, {name: plan_for_rank(layer.rank, ranks[name]) for name, layer in plain.items()})
