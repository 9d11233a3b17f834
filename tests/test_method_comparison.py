"""The experiments for PEFT's comparison of methods, from their folders to a result with the comparison's keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig

from benchmarks import method_comparison as comparison

pytestmark = pytest.mark.filterwarnings("ignore")

THEIRS = {
    "run_info": {
        *("created_at", "total_time", "experiment_name", "peft_branch", "peft_worktree_is_dirty", "train_config"),
        *("peft_config", "error_msg"),
    },
    "train_info": {
        *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"),
        *("train_time", "file_size", "num_trainable_params", "num_total_params", "status", "metrics"),
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}
"""The keys of a result in PEFT's repository."""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sums in place of GSM8K."""
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    for split, count in (("train", 120), ("test", 4)):
        rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setenv("LORANK_DATA", str(folder.parent))
    monkeypatch.setitem(comparison.DEFAULTS, "generation_kwargs", {"max_new_tokens": 2, "max_length": 60})
    monkeypatch.setattr(comparison, "FORGETTING_ROWS", 1)
    monkeypatch.setattr(comparison, "VALIDATION", 8)
    return tmp_path


def call(*arguments: str | Path) -> None:
    given = comparison.parser().parse_args([str(argument) for argument in arguments])
    given.do(given)


def test_from_a_wide_run_to_both_results(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("curve", "--experiments", data / "experiments", "--steps", "4")
    folder = data / "experiments" / "lora"
    plain, static = (PeftConfig.from_pretrained(str(folder / f"tiny-rank2{end}")) for end in ("", "-lorank-curve"))
    assert isinstance(plain, LoraConfig)
    assert isinstance(static, LoraConfig)
    assert len(set(static.rank_pattern.values())) > 1
    sizes = {}
    for name in ("tiny-rank2", "tiny-rank2-lorank-curve", "tiny-rank2-lorank-balanced"):
        call("run", folder / name, "--out", data / "results")
        result = json.loads((data / "results" / f"lora--{name}.json").read_text(encoding="utf-8"))
        assert set(result) == set(THEIRS)
        assert all(keys <= set(result[part]) for part, keys in THEIRS.items())
        info = result["train_info"]
        assert info["status"] == "success"
        assert info["metrics"][-1]["step"] == result["run_info"]["train_config"]["max_steps"] == 4
        assert {"valid accuracy", "train loss"} <= set(info["metrics"][0])
        assert {"test accuracy", "train loss", "forgetting"} <= set(info["metrics"][-1])
        sizes[name] = info["num_trainable_params"], info["num_trainable_params_at_start"]
    assert sizes["tiny-rank2"] == (41_472, 41_472)
    even, begun = sizes["tiny-rank2-lorank-balanced"]
    assert 0.97 * 41_472 < even <= 41_472
    assert begun == 41_472
    assert 0.97 * 41_472 < sizes["tiny-rank2-lorank-curve"][0] <= 41_472
    assert "written:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("so $1,200.\nThe answer is: $1,200.", "1200"),
        ("The answer is 3.50", "3.5"),
        ("The final answer is: 7\nand more", "7"),
        ("I do not know", None),
    ],
)
def test_answers(text: str, answer: str | None) -> None:
    assert comparison.answer_of(text) == answer


def test_mistakes_are_told(data: Path) -> None:
    with pytest.raises(SystemExit, match="not an experiment"):
        call("run", data)
    folder = data / "experiments" / "lora" / "mine"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "training_params.json").write_text('{"lr": 1}', encoding="utf-8")
    with pytest.raises(SystemExit, match="'lr' is not a setting"):
        call("run", folder)
    (folder / "training_params.json").unlink()
    (folder / "lorank.json").write_text('{"name": "balancd"}', encoding="utf-8")
    with pytest.raises(SystemExit, match="there is no method 'balancd'"):
        call("run", folder)
