"""The state of a run: everything that an exact resume needs besides the model's weights and the optimiser's moments.

It travels inside the optimiser's ``state_dict``, in the first parameter group, so that whoever saves and loads their
optimiser has saved and loaded it too. Plain types and tensors only. A file of weights shows plain LoRA; the form in
which layers are trained (gates, heads) is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from lorank.errors import ResumeError
from lorank.lora import AdapterLayers, HeadGroups, plan_for_rank, resize_, restore_layout_
from lorank.training.checkpoint.base_fingerprint import check_same_base
from lorank.training.checkpoint.state_schema import check_seal, sealed
from lorank.training.run_state import RunState

VERSION = 3
STATE_KEY = "lorank"
"""Under which a rank state travels, in an optimiser's first parameter group."""


def rank_state(run: RunState) -> dict[str, Any]:
    """The state, sealed with a hash of all that it says (:mod:`lorank.training.checkpoint.state_schema`)."""
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
        "state": {name: tensor.detach().clone() for name, tensor in run.memory.items()},
    }
    return sealed(state)


def restore_layers_(run: RunState, state: Mapping[str, Any]) -> None:
    """Gives the layers the form and the ranks of the state. The optimiser brings moments of these shapes."""
    restore_layout_(run.layers, saved_heads(state))
    _take_ranks_(run.layers, state["ranks"])


def restore_progress_(run: RunState, state: Mapping[str, Any]) -> None:
    """Gates, the method's memory and the counts of the state, for layers that have its ranks.

    Each tensor of the memory goes to where the method keeps it: to the device on which
    :meth:`~lorank.allocators.Allocator.start` made the one of that name. A checkpoint may have been read to elsewhere.
    """
    _load_gates_(run.layers, state["gated"])
    elsewhere = next(iter(run.layers.values())).A.device
    devices = {name: tensor.device for name, tensor in run.memory.items()}
    run.memory = {
        name: tensor.detach().clone().to(devices.get(name, elsewhere)) for name, tensor in state["state"].items()
    }
    run.step = state["step"]
    run.allocations = state["allocations"]
    run.finished = state["finished"]


def check_resumable(state: Mapping[str, Any], run: RunState) -> None:
    """Whether a saved rank state is whole, and of this run. Nothing is changed.

    Raises:
        ResumeError: it is damaged, or of another version, method, setting, seed, model or budget.
    """
    layers, info = run.layers, run.info
    if not isinstance(state, Mapping):
        raise ResumeError(f"the saved rank state is a {type(state).__name__}: the optimiser's file is damaged")
    if state.get("version") != VERSION:
        raise ResumeError(f"the saved rank state has version {state.get('version')!r}, this lorank reads {VERSION}")
    check_seal(state)
    ours: dict[str, Any] = {**run.allocator.describe(), "seed": info.seed}
    theirs: dict[str, Any] = {**state["allocator"], "seed": state["seed"]}
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        listed = "; ".join(f"{key}: saved {theirs.get(key)!r}, now {ours.get(key)!r}" for key in differing)
        raise ResumeError(f"the checkpoint is of another run ({listed}). Resume with the settings it was made with")
    shapes = {name: (layer.d_in, layer.d_out) for name, layer in layers.items()}
    if {name: tuple(shape) for name, shape in state["shapes"].items()} != shapes:
        raise ResumeError(
            f"the checkpoint is of another model: its {len(state['shapes'])} adapted modules differ in name or "
            f"shape from the {len(shapes)} here. Load the base model that the run was started with, and adapt the "
            "same modules"
        )
    most = {name: max(min(shape), info.initial_ranks.get(name, 0)) for name, shape in shapes.items()}
    if state["ranks"].keys() != most.keys() or any(rank > most[name] for name, rank in state["ranks"].items()):
        raise ResumeError("the saved rank state has ranks that its modules cannot have: it was not written by a run")
    check_same_base(state["base"], layers)
    if state["initial_ranks"] != info.initial_ranks:
        saved, now = sum(state["initial_ranks"].values()), sum(info.initial_ranks.values())
        raise ResumeError(
            f"the checkpoint's run began with another budget: {saved} ranks in {len(shapes)} modules, here {now}. "
            "Make the model as that run did, with get_peft_model and the same LoraConfig, not from the checkpoint"
        )


def _layers_state(layers: AdapterLayers) -> dict[str, Any]:
    """What a rank state says of the layers."""
    return {
        "shapes": {name: (layer.d_in, layer.d_out) for name, layer in layers.items()},
        "ranks": layers.ranks,
        "heads": _heads_state(layers),
        "gated": _gated_state(layers),
    }


def _gated_state(layers: AdapterLayers) -> dict[str, Any]:
    """Learned gates, and B as it is beneath them: a file holds the two folded into one. Empty without gates."""
    gates = layers.gates
    if gates is None:
        return {}
    return {
        "gates": gates.values.clone(),
        # What is in a pool is in its optimiser's checkpoint as it is.
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
    """The layers in per-head form: what the heads own, and the rank of each."""
    return {
        name: {**asdict(layer.groups), "ranks": list(layer.head_ranks)}
        for name, layer in layers.items()
        if layer.groups is not None
    }


def saved_heads(state: Mapping[str, Any]) -> dict[str, tuple[HeadGroups, list[int]]]:
    """The layers in per-head form of a saved rank state, as :func:`lorank.lora.restore_layout_` takes them."""
    heads: Mapping[str, Mapping[str, Any]] = state.get("heads", {})
    return {name: (HeadGroups(h["kind"], h["count"], h["size"]), h["ranks"]) for name, h in heads.items()}


def _take_ranks_(layers: AdapterLayers, ranks: Mapping[str, int]) -> None:
    """Gives plain layers these ranks; those in per-head form have theirs from :func:`lorank.lora.restore_layout_`."""
    plain = {name: layer for name, layer in layers.items() if layer.groups is None}
    resize_(layers, {name: plan_for_rank(layer.rank, ranks[name]) for name, layer in plain.items()})
