"""The files of an adapter are checked before PEFT reads them: settings, weights, and that the two fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorank.errors import AdapterError
from lorank.lora.io.adapter_validation import (
    CONFIG,
    MAX_CONFIG_BYTES,
    MAX_UNVERIFIED_RANK,
    PICKLED,
    WEIGHTS,
    check_weights,
    read_config,
)

SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {r"^model\.q_proj": 4},
    "alpha_pattern": {r"^model\.q_proj": 8.5},
    "megatron_config": None,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "has peft_type 'IA3', expected 'LORA'"),
    "a rank of zero": ({"r": 0}, "r: expected a rank of at least 1, got 0"),
    "a rank that is a truth value": ({"r": True}, "r: expected a rank of at least 1, got True"),
    "a rank of a module": ({"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\]: expected a rank of at least 1"),
    "an alpha of a module": ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\]: expected a number, got x"),
    "ranks in a list": ({"rank_pattern": [4]}, "rank_pattern: expected a mapping from module names, got list"),
    "an alpha that is too large": ({"lora_alpha": 1e31}, "lora_alpha: expected a number"),
    "a dropout of one": ({"lora_dropout": 1}, "lora_dropout: expected 0 ≤ p < 1, got 1"),
    "an import": ({"megatron_config": {}}, "megatron_config is refused: it makes PEFT import a module"),
    "a larger base": ({"layer_replication": [[0, 9]]}, "layer_replication is refused: it makes PEFT enlarge"),
    "a slow pattern": ({"target_modules": "(a+)+$"}, "target_modules: the pattern .* a repeat within a repeat"),
    "a slow key": ({"rank_pattern": {"(a+)+": 4}}, "rank_pattern: the pattern .* a repeat within a repeat"),
    "a slow pattern in a list": ({"modules_to_save": ["(a+)+"]}, "modules_to_save: the pattern"),
    "names that are no text": ({"target_modules": ["q", 3]}, "target_modules: expected a list of names"),
}


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**SETTINGS, **changes}))
    return path


def write_weights(folder: Path, rank: int) -> None:
    save_file({"model.q_proj.lora_A.weight": torch.zeros(rank, 3)}, folder / WEIGHTS)


class TestSettings:
    def test_settings_are_returned_as_they_are(self, tmp_path: Path) -> None:
        assert read_config(write_config(tmp_path)) == SETTINGS

    @pytest.mark.parametrize("name", REFUSED)
    def test_settings_that_are_refused(self, name: str, tmp_path: Path) -> None:
        changes, message = REFUSED[name]
        with pytest.raises(AdapterError, match=message):
            read_config(write_config(tmp_path, **changes))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": "LORA", "r": NaN}'])
    def test_a_file_that_holds_no_settings(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / CONFIG
        path.write_text(text)
        with pytest.raises(AdapterError, match=CONFIG):
            read_config(path)

    def test_a_file_that_is_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / CONFIG
        path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
        with pytest.raises(AdapterError, match="cannot be read"):
            read_config(path)


class TestWeights:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=f"has no {WEIGHTS}: copy it again"):
            check_weights(tmp_path, SETTINGS)

    def test_a_pickle(self, tmp_path: Path) -> None:
        (tmp_path / PICKLED).touch()
        with pytest.raises(AdapterError, match="a pickle, which can run any code when it is read"):
            check_weights(tmp_path, SETTINGS)

    def test_a_file_that_was_cut_off(self, tmp_path: Path) -> None:
        write_weights(tmp_path, 8)
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
        with pytest.raises(AdapterError, match=r"the weights in .* cannot be read"):
            check_weights(tmp_path, SETTINGS)

    @pytest.mark.parametrize("settings", [{"r": MAX_UNVERIFIED_RANK + 1}, {"rank_pattern": {"q": 2000}}])
    def test_a_large_rank_that_no_weight_has(self, settings: dict[str, Any], tmp_path: Path) -> None:
        write_weights(tmp_path, 8)
        with pytest.raises(AdapterError, match=r"the largest rank in .* is 8: the two files do not belong together"):
            check_weights(tmp_path, settings)

    @pytest.mark.parametrize(("named", "in_file"), [(8, 8), (MAX_UNVERIFIED_RANK, 1), (2000, 2000)])
    def test_a_rank_that_fits(self, named: int, in_file: int, tmp_path: Path) -> None:
        write_weights(tmp_path, in_file)
        check_weights(tmp_path, {"r": named})
