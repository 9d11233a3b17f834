"""The kinds of files that lorank reads, with valid ones to begin from, made on the spot."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

import lorank
from lorank.config.recipes import FOLDER as RECIPES
from lorank.config.settings import load_config
from lorank.experiments.compare.file import read_comparison
from lorank.experiments.sweep import load_sweep
from lorank.lora import LayerPlan, find_layers, load_adapter, resize_, save_adapter
from lorank.lora.io.adapter_validation import CONFIG, WEIGHTS
from lorank.report.grid import grid_of
from lorank.training.history import RankHistory, read_history
from tests.fuzz import Kind
from tests.fuzz_damage import ODD, damage_bytes, damage_value
from tests.methods import METHODS, STEPS
from tests.models import adapted, tiny_llama, token_batch


def yaml_kind() -> Kind:
    """Recipes and sweeps."""
    tokens = [b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"!!int ", b"!!timestamp ", b"2001-99-99", b": "]
    tokens += [
        b"[" * 60,
        b"{" * 60,
        b"\n- ",
        b"\n  ",
        b"? ",
        b"!!binary ",
        b"1e999",
        b"0x",
        b"\t",
        b"---\n",
        b"|\n",
        b"~",
    ]
    tokens += [b"0b_", b"1:2:3", b"!!set {a}", b"!!omap [a: 1]", b"!!float ", b".nan", b"&a [*a, *a]", b"%YAML 9.9\n"]
    tokens += [b"${", b"}", b"\\", b"${training.lr}", b"${oc.env:HOME}", b"${lora}", b"???"]

    def damage(draw: random.Random, data: bytes) -> bytes:
        if draw.random() < 0.5:
            return damage_bytes(draw, data, tokens)
        try:
            values = yaml.safe_load(data)
        except Exception:  # PyYAML raises anything: that is what the reader is tested for
            return damage_bytes(draw, data, tokens)
        try:
            return yaml.safe_dump(damage_value(draw, values), allow_unicode=True).encode("utf-8", "replace")
        except yaml.YAMLError:
            return damage_bytes(draw, data, tokens)

    def read(path: Path) -> None:
        text = path.read_bytes()
        if b"\nvariants:" in text or b"\nspace:" in text:
            load_sweep(path)
        elif b"\nmethods:" in text:
            read_comparison(path)
            read_comparison(path, quick=True)
        else:
            load_config(path)

    seeds = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
    return Kind(".yaml", seeds, damage, read)


def history_kind() -> Kind:
    """Rank histories."""
    tokens = [
        b"\n",
        b"{}",
        b"[",
        b'{"a":' * 2000,
        b"[" * 100_000,
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"\xff",
        b'"',
    ]

    def damage(draw: random.Random, data: bytes) -> bytes:
        lines = data.split(b"\n")
        if draw.random() < 0.4:
            return damage_bytes(draw, data, tokens)
        index = draw.randrange(len(lines))
        try:
            value = damage_value(draw, json.loads(lines[index]))
            lines[index] = json.dumps(value).encode("utf-8", "replace")
        except (ValueError, TypeError, RecursionError):
            return damage_bytes(draw, data, tokens)
        return b"\n".join(lines)

    def read(path: Path) -> None:
        for record in read_history(path):
            assert record.total_rank >= 0
            assert not record.shapes or record.parameters >= 0
            if record.ranks:
                grid_of(list(record.ranks)).values(record.ranks)
        records = RankHistory(path)
        records.resume(2, read_history(path)[0]) if read_history(path) else None
        assert [record.step for record in read_history(path)] == [record.step for record in records]

    return Kind(".jsonl", [_history(name) for name in ("alora", "adalora", "sora")], damage, read)


def _history(method: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "history.jsonl"
        _train(method, STEPS, history_path=path)
        return path.read_bytes()


def _train(method: str, steps: int, **attach: object) -> torch.optim.Optimizer:
    optimizer, model = _begin(method, **attach)
    for step in range(steps):
        model(**token_batch(2, 6, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _begin(method: str, **attach: object) -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    torch.manual_seed(0)
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = token_batch(2, 6, seed=9)
    lorank.attach(model, optimizer, METHODS[method].make(), total_steps=STEPS, validation_batch=batch, **attach)  # type: ignore[arg-type]  # settings of attach
    return optimizer, model


def adapter_config_kind() -> Kind:
    """The settings of an adapter, beside weights that are whole."""
    names = [
        "r",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "megatron_core",
        "layer_replication",
        "auto_mapping",
    ]
    names += ["exclude_modules", "modules_to_save", "trainable_token_indices", "target_parameters", "layers_pattern"]
    names += [
        "layers_to_transform",
        "use_dora",
        "use_qalora",
        "qalora_group_size",
        "init_lora_weights",
        "lora_bias",
        "bias",
    ]
    names += ["eva_config", "corda_config", "loftq_config", "arrow_config", "velora_config", "kasa_config", "peft_type"]
    names += ["alora_invocation_tokens", "use_bdlora", "monteclora_config", "task_type", "inference_mode", "revision"]
    tokens = [json.dumps(name).encode() + b": " for name in names]
    tokens += [
        b"1e999",
        b"-1",
        b"9" * 5000,
        b"NaN",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 2000,
        b'"(a+)+$"',
        b"\xff",
        b"{}",
    ]

    def damage(draw: random.Random, data: bytes) -> bytes:
        if draw.random() < 0.2:
            return damage_bytes(draw, data, tokens)
        try:
            values = json.loads(data)
            if draw.random() < 0.5 and isinstance(values, dict):
                values[draw.choice(names)] = draw.choice(ODD)
            return json.dumps(damage_value(draw, values)).encode("utf-8", "replace")
        except (ValueError, TypeError, RecursionError):
            return damage_bytes(draw, data, tokens)

    config, weights = _adapter()
    plain = {**json.loads(config), "target_modules": r".*\.(q_proj|v_proj)"}
    seeds = [config, json.dumps(plain).encode()]
    return Kind(".adapter_config.json", seeds, damage, lambda path: _open(path.read_bytes(), weights))


def adapter_kind() -> Kind:
    """The weights of an adapter, beside settings that are right."""
    tokens = [
        b'"dtype":"F64"',
        b'"shape":[1000000000000,8]',
        b'"data_offsets":[0,0]',
        b"[" * 1000,
        b"\xff" * 8,
        b"\x00" * 8,
    ]
    tokens += [b'"BF16"', b'"U8"', b'"BOOL"', b'"F8_E4M3"', b"-1", b"99999999999999999999", b'"__metadata__":{"a":1}']
    config, weights = _adapter()

    def damage(draw: random.Random, data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
        if draw.random() < 0.3 or length > len(data):
            return damage_bytes(draw, data, tokens)
        header, body = data[8 : 8 + length], data[8 + length :]
        try:
            header = json.dumps(damage_value(draw, json.loads(header))).encode("utf-8", "replace")
        except (ValueError, TypeError, RecursionError):
            header = damage_bytes(draw, header, tokens)
        return struct.pack("<Q", len(header)) + header + body

    return Kind(".safetensors", [weights], damage, lambda path: _open(config, path.read_bytes()))


def _base() -> torch.nn.Module:
    return tiny_llama()


def _adapter() -> tuple[bytes, bytes]:
    """Settings and weights of an adapter with other ranks in every module."""
    layers = find_layers(adapted(_base(), target_modules=["q_proj", "v_proj"]))
    resize_(layers, {name: LayerPlan(tuple(range(1 + i))) for i, name in enumerate(layers)})
    with TemporaryDirectory() as folder:
        save_adapter(layers, Path(folder) / "adapter")
        return tuple((Path(folder) / "adapter" / name).read_bytes() for name in (CONFIG, WEIGHTS))  # type: ignore[return-value]  # two


def _open(config: bytes, weights: bytes) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_bytes(config)
        (Path(folder) / WEIGHTS).write_bytes(weights)
        find_layers(load_adapter(_base(), folder))


KINDS: dict[str, Callable[[], Kind]] = {
    "adapter": adapter_kind,
    "adapter_config": adapter_config_kind,
    "history": history_kind,
    "yaml": yaml_kind,
}
