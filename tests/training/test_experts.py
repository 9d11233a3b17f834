"""Every method on parameters of experts: ranks move, files are plain PEFT, a run resumes exactly, `lorank prune`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer
from typer.testing import CliRunner

import lorank
from lorank.allocators import resize_layers_
from lorank.cli.app import app
from lorank.config.settings import make_config
from lorank.experiments.adapted_model import adapted_model
from lorank.experiments.errors import SettingsError
from lorank.experiments.models import resolve
from lorank.lora import find_layers, load_adapter
from tests.methods import METHODS, STEPS
from tests.models import adapted, token_batch
from tests.moe import EXPERTS, FAMILIES, PARAMETERS, tiny_mixtral

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
CASES = [
    ("mixtral", "alora-first-order"),
    ("mixtral", "adalora"),
    ("mixtral", "balanced"),
    ("qwen3_moe", "ard"),
    ("gpt_oss", "balanced"),
    ("llama4", "alora-first-order"),
]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ranks_of_experts_move_and_what_is_saved_is_plain_peft(name: str, kind: str, tmp_path: Path) -> None:
    family, method = FAMILIES[name], METHODS[kind]
    model = adapted(family.make(), random_B=False, **{**method.lora, **family.targets}).train()
    optimizer, batch = adamw(model), token_batch(seed=99)
    budget = {"budget": "100% of adapter"} if kind.startswith("alora") else {}
    ranks = lorank.attach(model, optimizer, method.make(**budget), validation_batch=batch, total_steps=STEPS, seed=7)
    made = ranks.layers.parameters
    while ranks.step < STEPS:
        model(**token_batch(seed=ranks.step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own = [layer for layer in ranks.layers.values() if layer.is_expert]
    assert len(own) == 4
    assert len({tuple(record.ranks[layer.name] for layer in own) for record in ranks.history}) > 1, "no rank has moved"
    assert any(layer.B.any() for layer in own), "none has been trained"
    if budget:
        assert ranks.layers.parameters <= made
    model.eval()
    with torch.no_grad():
        after = model(**batch).logits
    lorank.save_adapter(ranks.layers, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(family.make(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, after)
        torch.testing.assert_close(plain.merge_and_unload()(**batch).logits, after, rtol=1e-4, atol=1e-5)


def run(steps: range, method: lorank.Allocator, saved: dict[str, Any] | None, stop: int | None) -> tuple[Any, Any, Any]:
    model = adapted(tiny_mixtral(), **FAMILIES["mixtral"].targets).train()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, method, validation_batch=token_batch(seed=99), total_steps=8, seed=3)
    if saved is not None:
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for step in steps:
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step + 1 == stop:
            weights = {key: value.clone() for key, value in model.state_dict().items() if "base_layer.gate" not in key}
            return losses, ranks, {"model": weights, "optimizer": optimizer.state_dict()}
    return losses, ranks, None


def test_resume_is_bitwise() -> None:
    method = lorank.SoRA(prune_every=1, until=0.7, budget="40% of adapter")
    straight, whole, _ = run(range(8), method, None, None)
    first, _, saved = run(range(8), method, None, 5)
    second, resumed, _ = run(range(5, 8), method, saved, None)
    assert first + second == straight
    assert resumed.layers.ranks == whole.layers.ranks
    assert len({tuple(record.ranks.values()) for record in whole.history}) > 1
    for name, layer in whole.layers.items():
        assert torch.equal(layer.A, resumed.layers[name].A)
        assert torch.equal(layer.B, resumed.layers[name].B)


def test_prune_and_resize_from_the_command_line(tmp_path: Path) -> None:
    tiny_mixtral(vocab_size=4096, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(tmp_path / "model")
    model = adapted(
        type(tiny_mixtral()).from_pretrained(tmp_path / "model"),
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        target_parameters=PARAMETERS,
    )
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts").mkdir()
    for split in ("train", "validation"):
        rows = [{"text": f"The quick brown fox jumps over line {index} of {split}. " * 4} for index in range(8)]
        (tmp_path / "texts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(*arguments: str | Path) -> Any:
        return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(part) for part in arguments])

    found = command(
        "prune", tmp_path / "adapter", "--budget", "50%", "--data", tmp_path / "texts", "--samples", "4",
        "--out", tmp_path / "half", "task.block_size=32",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    half = find_layers(load_adapter(type(tiny_mixtral()).from_pretrained(tmp_path / "model"), tmp_path / "half"))
    whole = find_layers(model)
    assert 0.35 * whole.parameters < half.parameters <= 0.5 * whole.parameters
    assert any(half.ranks[name] != whole.ranks[name] for name in half if half[name].is_expert)
    assert half["model.layers.0.mlp.experts.down_proj"].layout.experts == EXPERTS
    for size, folder in (("--rank", "2"), "two"), (("--energy", "0.6"), "energy"):
        found = command("resize", tmp_path / "half", *size, "--out", tmp_path / folder)
        assert found.exit_code == 0, found.output
        base = type(tiny_mixtral()).from_pretrained(tmp_path / "model")
        resized = find_layers(load_adapter(base, tmp_path / folder))
        live = find_layers(load_adapter(type(base).from_pretrained(tmp_path / "model"), tmp_path / "half"))
        resize_layers_(live, **({"rank": 2} if folder == "two" else {"energy": 0.6}))
        assert resized.ranks == live.ranks
        for name, layer in live.items():
            torch.testing.assert_close(resized[name].layout.norms(resized[name].A, resized[name].B),
                                       layer.layout.norms(layer.A, layer.B), rtol=1e-4, atol=1e-6)  # fmt: skip
    (tmp_path / "model" / "config.json").unlink()
    refused = command("resize", tmp_path / "half", "--rank", "2", "--out", tmp_path / "three")
    assert refused.exit_code == 2
    assert "lorank.resize_adapter_" in " ".join(refused.output.split())


def test_a_configuration_names_parameters(tmp_path: Path) -> None:
    tiny_mixtral().save_pretrained(tmp_path / "model")
    example: Any = {"input_ids": [1, 2]}
    tokenizer = SimpleNamespace(pad_token_id=0)
    task: Any = SimpleNamespace(
        model_kind="causal_lm", train=[example], validation=[example], collator=SimpleNamespace(tokenizer=tokenizer)
    )

    def made(*names: str) -> Any:
        values = {
            "model": {"name": str(tmp_path / "model")},
            "lora": {"r": 3, "target_modules": ["q_proj"], "target_parameters": list(names)},
            "task": {"name": "language_modelling", "data": "texts"},
            "allocator": {"name": "static"},
            "output_dir": str(tmp_path / "run"),
        }
        return find_layers(adapted_model(make_config(values, (), source="a test"), task))

    assert {name.rpartition(".")[2] for name in made("experts.down_proj")} == {"q_proj", "down_proj"}
    with pytest.raises(SettingsError, match=r"has no parameter 'experts\.up' to adapt"):
        made("experts.down_proj", "experts.up")
