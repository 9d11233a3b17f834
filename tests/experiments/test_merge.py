"""`lorank merge`: the sum of adapters is exact, and a cut keeps the best part of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from lorank.cli.app import app
from lorank.experiments.merge import merge
from lorank.lora import find_layers
from tests.models import adapted

TEXTS = ("The quick brown fox jumps over the lazy dog. ", "One two three four five six seven eight nine. ")


def lorank(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "400", "LORANK_DATA": None}).invoke(app, ["merge", *map(str, arguments)])


@pytest.fixture(scope="module")
def pair(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Other ranks, factors and modules; one with rsLoRA."""
    folders = []
    for number, settings in enumerate(
        (
            {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
            {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        )
    ):
        model = adapted(AutoModelForCausalLM.from_pretrained(model_folder), task_type="CAUSAL_LM", **settings)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        folders.append(tmp_path_factory.mktemp("pair") / f"adapter{number}")
        model.save_pretrained(folders[-1])
    return folders[0], folders[1]


def updates(model_folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    return {
        name: layer.scaling * layer.B.detach().double() @ layer.A.detach().double()
        for name, layer in find_layers(model).items()
    }


def wanted_sum(model_folder: Path, pair: tuple[Path, Path], weights: tuple[float, float]) -> dict[str, torch.Tensor]:
    total: dict[str, Any] = {}
    for folder, weight in zip(pair, weights, strict=True):
        for name, update in updates(model_folder, folder).items():
            total[name] = total.get(name, 0) + weight * update
    return total


def test_without_a_size_it_is_the_sum(model_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = lorank(*pair, "--weights", "1,-0.5", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["by"], shown["weights"]) == (None, [1, -0.5])
    assert shown["energy"] == pytest.approx(1)
    found = updates(model_folder, tmp_path / "out")
    wanted = wanted_sum(model_folder, pair, (1, -0.5))
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=0, atol=1e-6)
    assert {pair[1] for pair in shown["ranks"].values()} == {2, 4, 7}


def test_svd_keeps_the_best_part_of_each_module(model_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    merged = merge(pair, tmp_path / "out", rank=2)
    assert (merged.by, merged.weights) == ("svd", (0.5, 0.5))
    found = updates(model_folder, tmp_path / "out")
    kept = total = 0.0
    for name, update in wanted_sum(model_folder, pair, (0.5, 0.5)).items():
        U, S, V = torch.linalg.svd(update)
        torch.testing.assert_close(found[name], U[:, :2] * S[:2] @ V[:2], rtol=0, atol=1e-6)
        kept, total = kept + float(S[:2].square().sum()), total + float(S.square().sum())
    assert merged.energy == pytest.approx(kept / total, abs=1e-6)


def test_balanced_measures_on_the_data_of_all_tasks(
    model_folder: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    configs = []
    for number, text in enumerate(TEXTS):
        data = tmp_path / f"data{number}"
        data.mkdir()
        for split in ("train", "validation"):
            rows = [json.dumps({"text": text * 4 + str(row)}) + "\n" for row in range(12)]
            (data / f"{split}.jsonl").write_text("".join(rows))
        configs.append(tmp_path / f"task{number}.yaml")
        settings = {
            "model": {"name": str(model_folder)},
            "task": {"name": "language_modelling", "data": str(data), "block_size": 16},
            "allocator": {"name": "static"},
            "output_dir": str(tmp_path / "run"),
        }
        configs[-1].write_text(yaml.safe_dump(settings))
    options = [option for config in configs for option in ("--config", config)]
    out = tmp_path / "out"
    result = lorank(*pair, *options, "--rank", 2, "--samples", 4, "--out", out)
    assert result.exit_code == 0, result.output
    assert "cut by" in result.stdout
    assert result.stdout.count("validation loss, ") == 2
    other = merge(pair, tmp_path / "one", rank=2, configs=configs[:1], samples=4)
    assert (other.by, len(other.losses)) == ("balanced", 1)
    assert {pair[1] for pair in other.ranks.values()} <= {0, 1, 2}
    both, one = updates(model_folder, out), updates(model_folder, tmp_path / "one")
    assert any(not torch.allclose(both[name], one[name]) for name in both.keys() & one.keys())
    assert lorank(*pair, "--by", "balanced", "--rank", 2, "--out", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1"], "--weights has 1 numbers for 2 adapters"),
        (["--weights", "1,x"], "expected numbers with commas"),
        (["--weights", "1,0"], "expected numbers other than 0"),
        (["--rank", 2, "--budget", "50%"], "not both"),
        (["--budget", "1% of base"], "is a part of the base model"),
        (["--budget", "6"], "already fits the budget"),
        (["--by", "size"], "expected one of balanced, svd"),
    ],
)
def test_mistakes(pair: tuple[Path, Path], tmp_path: Path, options: list[object], message: str) -> None:
    result = lorank(*pair, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "give two or more" in lorank(pair[0], "--out", tmp_path / "out").stderr
    assert "is the adapter itself" in lorank(pair[1], pair[0], "--out", pair[1]).stderr
    other = tmp_path / "other"
    other.mkdir()
    for path in pair[1].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    for changes, message in (
        ({"base_model_name_or_path": "someone/else"}, "are of different base models"),
        ({"use_dora": True}, "also has DoRA"),
    ):
        (other / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        assert message in lorank(pair[0], other, "--out", tmp_path / "out").stderr
    assert not (tmp_path / "out").exists()
