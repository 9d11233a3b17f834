"""The updates of any plain LoRA adapter, read from its files: what an export is made of.

PEFT finds the rank and alpha of a module by the first key of ``rank_pattern`` and ``alpha_pattern`` that matches its
name. The same function of PEFT is used here, so regular expressions, suffixes and full names mean what they mean there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from lorank.errors import AdapterError
from lorank.lora.initialisation import changes_base
from lorank.lora.io.adapter_folder import readable_folder
from lorank.lora.io.adapter_validation import WEIGHTS, check_weights
from lorank.lora.io.load_adapter import read_adapter_config
from lorank.lora.rank_zero import target_entries
from lorank.lora.scaling import scaling_of

PREFIX = "base_model.model."
"""What PEFT writes in front of the name of every module."""
_RANK_0 = target_entries([""])[0]
_KEY = re.compile(
    r"(?P<name>.+)\.lora_(?P<embedding>embedding_)?(?P<part>A|B|magnitude_vector)(?P<end>\.weight|\.bias)?"
)
# The settings of PEFT with which a layer computes something else than W x + s B A x, and what users call them.
_OTHER_FORWARD = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "Activated LoRA",
}


@dataclass(frozen=True)
class Update:
    """The update of one module, s · B A.

    Attributes:
        A: (r, d_in), of an embedding (r, number of embeddings), of a convolution (r, channels in, kernel …).
        B: (d_out, r), of an embedding (embedding width, r), of a convolution (channels out, r, 1 …).
        scaling: s.
        is_embedding: whether A and B are those of an embedding.
        magnitude: DoRA's vector, (d_out,); None: there is none.
        bias: the bias of B, (d_out,) (``lora_bias``), multiplied by s as B is; None: there is none.
    """

    A: Tensor
    B: Tensor
    scaling: float
    is_embedding: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def is_convolution(self) -> bool:
        return self.A.dim() > 2

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """s · B and A in float64, as matrices (d_out, r) and (r, everything else)."""
        B = self.B.double().flatten(1) if self.is_convolution else self.B.double()
        return self.scaling * B, self.A.double().flatten(1)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter, read without its base model.

    Attributes:
        folder: where it was read from.
        config: its settings.
        settings: its settings as they stand in the file.
        updates: its modules' updates, by full names.
        others: the tensors of the file that are no LoRA, by their keys: saved modules, biases, new tokens.
        empty: the modules that lorank stated at rank 0.
    """

    folder: Path
    config: LoraConfig
    settings: Mapping[str, Any]
    updates: Mapping[str, Update]
    others: Mapping[str, Tensor]
    empty: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: one.rank for name, one in self.updates.items()}

    @property
    def numbers(self) -> int:
        """The numbers in all A and B."""
        return sum(one.A.numel() + one.B.numel() for one in self.updates.values())

    @property
    def other_forward(self) -> str | None:
        """The name of the variant of LoRA that the adapter is, such as DoRA; None: it is plain LoRA."""
        return next((name for field, name in _OTHER_FORWARD.items() if getattr(self.config, field, None)), None)

    @property
    def beside_lora(self) -> list[str]:
        """What the adapter holds beside plain LoRA of linear maps and embeddings, in words."""
        config, found = self.config, []
        if self.other_forward:
            found.append(self.other_forward)
        if any(one.bias is not None for one in self.updates.values()):
            found.append("biases of B (lora_bias)")
        if config.modules_to_save:
            found.append(f"whole modules ({', '.join(config.modules_to_save)})")
        if config.trainable_token_indices:
            found.append("trained tokens (trainable_token_indices)")
        if config.bias != "none":
            found.append(f"biases of the base model (bias={config.bias!r})")
        # PEFT also saves the weight of an embedding or an output layer that has a LoRA. It is the base model's own.
        of_base = {f"{PREFIX}{name}.base_layer.weight" for name in self.updates}
        unknown = [key.removeprefix(PREFIX) for key in self.others if key not in of_base]
        if unknown and not (config.modules_to_save or config.trainable_token_indices or config.bias != "none"):
            found.append(f"tensors that are no LoRA ({unknown[0]})")
        return found

    def check_sizes(self, rows: Mapping[str, int]) -> None:
        """Checks that no embedding has more rows than the base model's, as it has for new tokens.

        Args:
            rows: the number of embeddings of the base model's embeddings, by their names.

        Raises:
            AdapterError: an embedding has another number of rows.
        """
        for name, one in self.updates.items():
            if one.is_embedding and name in rows and rows[name] != one.A.shape[1]:
                raise AdapterError(
                    f"{name} has {one.A.shape[1]} embeddings with the adapter, and {rows[name]} in the base model (new "
                    "tokens?). No adapter can hold this elsewhere than in PEFT: use --form peft or merged"
                )


def read_adapter_file(folder: str | Path) -> AdapterFile:
    """Reads a plain PEFT LoRA adapter without its base model.

    Raises:
        AdapterError: the folder holds no LoRA adapter; its weights cannot be read, are not complete or do not fit its
            settings; its initialisation changed the base weights; or it adapts parameters without a module.
    """
    folder = readable_folder(Path(folder))
    settings = read_adapter_config(folder)
    check_weights(folder, settings)
    _check_kind(folder, settings)
    config = LoraConfig.from_pretrained(str(folder))
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key] = tensor
            continue
        part = match["part"] + ("" if match["end"] != ".bias" else ".bias")
        own = parts.setdefault(match["name"].removeprefix(PREFIX), {})
        own[part] = tensor
        if match["embedding"]:
            own["embedding"] = tensor
    if not parts:
        raise AdapterError(f"{folder / WEIGHTS} holds no LoRA weights under PEFT's names ({PREFIX}….lora_A.weight)")
    updates = {name: _update(folder, config, name, own) for name, own in parts.items()}
    return AdapterFile(folder, config, settings, updates, others, _stated_empty(settings))


def _check_kind(folder: Path, settings: Mapping[str, Any]) -> None:
    init = settings.get("init_lora_weights")
    if changes_base(init):
        raise AdapterError(
            f"the adapter in {folder} was made with init_lora_weights={init!r}, which changed the "
            "base weights: its A and B are no update of the base model that others have. Convert it to a plain LoRA "
            "first (docs/compatibility.md shows how), then export that"
        )
    if settings.get("target_parameters"):
        raise AdapterError(
            f"the adapter in {folder} adapts parameters without a module (target_parameters), as those of experts. "
            "Only PEFT reads this form. Merge it: --form merged"
        )


def _update(folder: Path, config: LoraConfig, name: str, own: Mapping[str, Tensor]) -> Update:
    A, B = own.get("A"), own.get("B")
    if A is None or B is None:
        missing = "lora_A" if A is None else "lora_B"
        raise AdapterError(f"the weights in {folder} are not complete: {name} has no {missing}. Save the adapter again")
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    if not (A.dim() == B.dim() >= 2 and len(A) == B.shape[1] == rank):
        raise AdapterError(
            f"the weights and the settings in {folder} do not fit each other: {name} has lora_A of shape "
            f"{tuple(A.shape)} and lora_B of shape {tuple(B.shape)}, and rank {rank} in the settings"
        )
    if not bool(A.isfinite().all() and B.isfinite().all()):
        raise AdapterError(f"{name} in {folder} has weights that are NaN or infinite: there is nothing to export")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return Update(
        A=A,
        B=B,
        scaling=scaling_of(alpha, rank, config.use_rslora),
        is_embedding="embedding" in own,
        magnitude=own.get("magnitude_vector"),
        bias=own.get("B.bias"),
    )


def _stated_empty(settings: Mapping[str, Any]) -> tuple[str, ...]:
    targets = settings.get("target_modules") or ()
    entries = targets.split("|") if isinstance(targets, str) else targets
    return tuple(sorted(e.removeprefix(_RANK_0).replace("\\", "") for e in entries if e.startswith(_RANK_0)))


def stored_dtype(adapter: AdapterFile) -> torch.dtype:
    """The dtype of the adapter's A and B; of several, the one that holds all of them."""
    found = [tensor.dtype for one in adapter.updates.values() for tensor in (one.A, one.B)]
    result = found[0]
    for dtype in found:
        result = torch.promote_types(result, dtype)
    return result
