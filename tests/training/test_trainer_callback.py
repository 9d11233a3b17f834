"""The real Trainer and TRL's: they allocate, their checkpoints are plain adapters, a killed run resumes bitwise."""

from __future__ import annotations

import copy
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import lorank
from lorank.allocators import AdaLoRA
from lorank.errors import ResumeError, ValidationBatchError
from lorank.testing import plain_peft
from lorank.training.checkpoint.integrity import find_problem
from tests.models import adapted, tiny_bert, tiny_llama, token_batch
from tests.training.trainer_run import make_trainer, rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


def test_the_trainer_allocates_and_every_checkpoint_is_a_plain_adapter(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_steps=1)
    logits = {}

    class Snapshot(lorank.training.trainer_callback.TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs) -> None:
            was_training = model.training
            model.eval()
            with torch.no_grad():
                logits[state.global_step] = model(**token_batch(seed=5)).logits
            model.train(was_training)

    trainer.add_callback(Snapshot())
    trainer.train()
    history = lorank.read_history(tmp_path / "rank_history.jsonl")
    assert [record.step for record in history] == [0, 1, 3, 5, 7, 9]
    assert len({tuple(record.ranks.values()) for record in history}) == 6
    assert sorted(logits) == list(range(1, 13))
    tiny_llama().save_pretrained(tmp_path / "base")
    for step, expected in logits.items():
        out = plain_peft().logits(tmp_path / "base", tmp_path / f"checkpoint-{step}", token_batch(seed=5))
        for found in out.values():
            assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), step
        folders = [path for path in (tmp_path / f"checkpoint-{step}").iterdir() if path.is_dir()]
        assert not folders  # one with adapter files would be loaded by PEFT as a further adapter
    card = (tmp_path / "checkpoint-4" / "README.md").read_text(encoding="utf-8")
    assert "| Method | ALoRA(" in card
    assert "| Steps | 4 of 12 |" in card
    assert find_problem(tmp_path / "checkpoint-4") is None  # the seal is of the card too


def test_load_best_model_at_end_takes_the_best_ranks(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=5e-2,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    step = int(best.name.split("-")[1])
    assert step < 12
    history = lorank.read_history(tmp_path / "rank_history.jsonl")
    at_best = next(record for record in reversed(history) if record.step <= step)
    assert lorank.find_layers(trainer.model).ranks == at_best.ranks
    assert at_best.ranks != history[-1].ranks
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def shrinking_trainer(tmp_path: Path, **changes) -> Trainer:
    """AdaLoRA from 56 ranks to 28 at step 8 of 12; by its metric, the earlier a checkpoint is, the better."""
    evaluations = itertools.count()
    settings = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "order",
        "greater_is_better": False,
    }
    trainer = make_trainer(tmp_path, **{**settings, **changes})
    trainer.compute_metrics = lambda _: {"order": next(evaluations)}
    trainer.pop_callback(lorank.RankCallback)
    trainer.add_callback(lorank.RankCallback(AdaLoRA(t_init=2, t_final=4, delta_t=2)))
    return trainer


def test_the_best_checkpoint_is_one_within_the_budget(tmp_path: Path) -> None:
    trainer = shrinking_trainer(tmp_path)
    started = lorank.find_layers(trainer.model).total_rank
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-8"
    assert lorank.find_layers(trainer.model).total_rank <= started // 2


def test_best_weights_over_the_budget_are_pruned_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = shrinking_trainer(tmp_path, max_steps=6)
    trainer.pop_callback(lorank.RankCallback)
    callback = lorank.RankCallback(AdaLoRA(t_init=2, t_final=2, delta_t=2))
    trainer.add_callback(callback)

    class StopsEarly(lorank.training.trainer_callback.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer.add_callback(StopsEarly())
    started = lorank.find_layers(trainer.model).total_rank
    trainer.train()  # the best checkpoint, of step 2, has all the ranks
    layers = lorank.find_layers(trainer.model)
    assert layers.total_rank <= started // 2
    assert "more than the budget allows" in caplog.text
    assert all(layer.gate is None for layer in layers.values())
    assert callback.ranks.history[-1].details == {"cut": True}


def test_a_run_killed_between_two_allocations_resumes_bitwise_in_a_new_process(tmp_path: Path) -> None:
    """Allocations after steps 1, 3, 5, 7, 9; killed at the end of step 8, resumed from the checkpoint of step 6."""
    command = [sys.executable, "-m", "tests.training.trainer_run", str(tmp_path), "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines()[-1:] == ["0 -9 0"], done.stderr
    straight, resumed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "killed"))
    assert len(straight["losses"]) == 12
    assert resumed == straight
    assert resumed["history"] == [0, 1, 3, 5, 7, 9]


def emptying_trainer(output: Path, **changes) -> Trainer:
    """SoRA, which takes all ranks from some modules."""
    trainer = make_trainer(output, **{"save_steps": 1, **changes})
    trainer.pop_callback(lorank.RankCallback)
    trainer.add_callback(lorank.RankCallback(lorank.SoRA(prune_every=2)))
    return trainer


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(seed=5)).logits


def in_plain_peft(checkpoint: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny_llama(), checkpoint).eval()


def test_after_a_run_the_model_is_copied_pickled_and_loaded_as_any_other(tmp_path: Path) -> None:
    trainer = emptying_trainer(tmp_path)
    trainer.train()
    model, layers = trainer.model, lorank.find_layers(trainer.model)
    end, end_ranks = logits(model), layers.ranks
    early, late = tmp_path / "checkpoint-2", tmp_path / "checkpoint-12"
    assert 0 not in lorank.find_layers(in_plain_peft(early)).ranks.values()
    assert 0 in end_ranks.values()

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.load_adapter(early, "default")
        assert torch.equal(logits(other), logits(in_plain_peft(early)))
        other.load_adapter(late, "default")
        assert lorank.find_layers(other).ranks == end_ranks
        assert torch.equal(logits(other), end)
        assert layers.ranks == end_ranks
        assert torch.equal(logits(model), end)

    some = {key: value for key, value in get_peft_model_state_dict(model).items() if "layers.1" in key}
    set_peft_model_state_dict(model, some)  # a part of its own weights
    assert layers.ranks == end_ranks
    assert torch.equal(logits(model), end)
    model.load_adapter(early, "default")
    assert torch.equal(logits(model), logits(in_plain_peft(early)))

    for again in (trainer, emptying_trainer(tmp_path)):  # the trainer of the first run, and a new one
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert lorank.find_layers(again.model).ranks == end_ranks
        assert torch.equal(logits(again.model), end)


@pytest.mark.parametrize("best", [3, 9])
def test_load_best_model_at_end_across_modules_at_rank_0(tmp_path: Path, best: int) -> None:
    evaluations = itertools.count(1)
    trainer = emptying_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="distance",
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda _: {"distance": abs(next(evaluations) - best)}
    # No budget: the best checkpoint may be one from before the ranks were removed.
    trainer.pop_callback(lorank.RankCallback)
    trainer.add_callback(lorank.RankCallback(lorank.SoRA(prune_every=2, budget=None)))
    trainer.train()
    checkpoint = Path(trainer.state.best_model_checkpoint)
    saved = in_plain_peft(checkpoint)
    ranks = lorank.find_layers(trainer.model).ranks
    assert {name: rank for name, rank in ranks.items() if rank} == lorank.find_layers(saved).ranks
    assert torch.equal(logits(trainer.model), logits(saved))


def test_resuming_without_the_callbacks_state_or_with_other_settings_is_refused(tmp_path: Path) -> None:
    plain = Trainer(
        model=adapted(tiny_llama()),
        args=TrainingArguments(str(tmp_path / "plain"), max_steps=2, save_steps=1, report_to=[], use_cpu=True),
        train_dataset=rows(8, seed=0),
    )
    plain.train()
    with pytest.raises(ResumeError, match="resumes after step 1, but the checkpoint's optimiser holds no rank state"):
        make_trainer(tmp_path / "plain").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))
    assert not list((tmp_path / "plain").glob("rank_history*"))  # a refusal leaves nothing half-done
    make_trainer(tmp_path / "run", max_steps=3).train()
    with pytest.raises(ResumeError, match="seed: saved 7, now 8"):
        make_trainer(tmp_path / "run", seed=8).train(resume_from_checkpoint=True)


def test_a_new_run_in_an_old_folder_moves_the_old_history_aside(tmp_path: Path) -> None:
    for _ in range(2):
        make_trainer(tmp_path, max_steps=1, save_strategy="no").train()
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"rank_history.jsonl", "rank_history.1.jsonl"}


def test_scoring_reports_its_progress(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    allocator = lorank.ALoRA(k1=1, unit="steps", rounds=1, per_round=3, scores="exact")
    Trainer(
        model=adapted(tiny_llama()),
        args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True),
        train_dataset=rows(8, seed=0),
        callbacks=[lorank.RankCallback(allocator, progress=lambda done, total: heard.append((done, total)))],
    ).train()
    assert heard[-1] == (2 * 14 * 4 + 1, 2 * 14 * 4 + 1)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_a_second_train_is_a_new_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    after_first = lorank.find_layers(trainer.model).ranks
    trainer.train()
    history = lorank.read_history(tmp_path / "rank_history.jsonl")
    assert [record.step for record in history] == [0, 1]
    assert history[0].ranks == after_first


def test_the_same_trainer_can_resume_from_its_own_checkpoint(tmp_path: Path) -> None:
    """As in a notebook: training went on, and is taken back to an earlier checkpoint with other ranks."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    ranks = lorank.find_layers(trainer.model).ranks
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items() if "lora_" in key}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert lorank.find_layers(trainer.model).ranks == ranks
    again = trainer.model.state_dict()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_without_a_batch_the_training_set_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = lorank.RankCallback(lorank.ALoRA(k1=1, unit="steps", rounds=1, per_round=3, samples=5))
    trainer = Trainer(
        model=adapted(tiny_bert(), task_type="SEQ_CLS"),
        args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True),
        train_dataset=[{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows(8, seed=0))],
        callbacks=[callback],
    )
    with caplog.at_level("WARNING", "lorank"):
        trainer.train()
    assert "on the first 5 rows of the training set" in caplog.text
    assert len(callback.ranks.history.allocations) == 1


class TestErrors:
    def start(self, tmp_path: Path, validation_batch) -> None:
        callback = lorank.RankCallback(lorank.ALoRA(), validation_batch=validation_batch)
        Trainer(
            model=adapted(tiny_llama()),
            args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True),
            train_dataset=rows(8, seed=0),
            callbacks=[callback],
        ).train()

    def test_no_rows(self, tmp_path: Path) -> None:
        with pytest.raises(ValidationBatchError, match="no rows were given"):
            self.start(tmp_path, [])

    def test_rows_in_another_form(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValidationBatchError,
            match=r"(?s)collator cannot make a batch .* validation_batch=lambda: trainer\.eval_dataset",
        ):
            self.start(tmp_path, ["text", "that nobody tokenised"])

    def test_a_stream(self, tmp_path: Path) -> None:
        with pytest.raises(ValidationBatchError, match=r"rows that can be indexed, got .*take\(32\)"):
            self.start(tmp_path, iter([]))

    def test_no_samples(self) -> None:
        with pytest.raises(ValidationBatchError, match="samples=0"):
            lorank.RankCallback(lorank.ALoRA(), samples=0)


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_trls_sft_trainer_allocates(tmp_path: Path) -> None:
    """Raw text in, TRL makes the PEFT model and tokenises; B_val is its own evaluation set."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts = Dataset.from_list([{"text": " ".join(f"w{(i * j) % 60}" for j in range(1, 6 + i % 7))} for i in range(24)])
    callback = lorank.RankCallback(
        lorank.ALoRA(k1=2, k2=2, rounds=2, unit="steps", per_round=6), validation_batch=lambda: trainer.eval_dataset
    )
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=5,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=16,
        ),
        train_dataset=texts.select(range(16)),
        eval_dataset=texts.select(range(16, 24)),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    allocations = callback.ranks.history.allocations
    assert [record.step for record in allocations] == [2, 4]
    assert all(record.details["scored_by"] == "first_order" for record in allocations)
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-5")
    assert lorank.find_layers(reloaded).ranks == {k: r for k, r in allocations[-1].ranks.items() if r}


class TestBalanced:
    """A gradient start needs batches of training data. The callback draws them."""

    def train(
        self, folder: Path, allocator: lorank.Allocator, data=None, resume: Path | None = None, **options
    ) -> tuple[lorank.Ranks, list[float]]:
        torch.manual_seed(3)
        callback = lorank.RankCallback(allocator, **options)
        trainer = Trainer(
            model=adapted(tiny_llama(), r=2),
            args=TrainingArguments(
                str(folder),
                max_steps=12,
                per_device_train_batch_size=4,
                logging_steps=1,
                save_steps=2,
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=rows(24, seed=0) if data is None else data,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return callback.ranks, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    def test_one_line_begins_wide_and_ends_within_the_budget(self, tmp_path: Path) -> None:
        ranks, losses = self.train(tmp_path, lorank.BalancedLoRA())
        sizes = [record.parameters for record in ranks.history]
        assert [record.step for record in ranks.history] == [0, 1, 2, 4]
        made = 2 * sum(d_in + d_out for d_in, d_out in ranks.history[0].shapes.values())
        assert sizes[0] > 3 * made  # four times, as far as whole ranks fit
        assert sizes == sorted(sizes, reverse=True)
        assert 0.9 * made < sizes[-1] <= made
        assert all(torch.isfinite(torch.tensor(losses)))

    def test_the_data_and_their_order_are_those_of_any_run(self, tmp_path: Path) -> None:
        seen: list[list[int]] = []

        class Watched(list):
            def __getitem__(self, index: int):
                seen[-1].append(index)
                return super().__getitem__(index)

        for allocator in (lorank.StaticLoRA(), lorank.BalancedLoRA()):
            seen.append([])
            self.train(tmp_path / type(allocator).__name__, allocator, Watched(rows(24, seed=0)))
        static, balanced = seen
        drawn = balanced[: len(balanced) - len(static)]
        assert len(drawn) == len(set(drawn)) == 4 * 4  # four batches of four rows
        assert balanced[len(drawn) :] == static

    def test_a_resumed_run_draws_none_and_continues_bitwise(self, tmp_path: Path) -> None:
        whole, losses = self.train(tmp_path / "whole", lorank.BalancedLoRA())

        def refuse():
            raise AssertionError("a resumed run needs no batches")

        checkpoint = tmp_path / "whole" / "checkpoint-2"  # one cut is to come
        again, continued = self.train(
            tmp_path / "again", lorank.BalancedLoRA(), resume=checkpoint, train_batches=refuse
        )
        assert continued == losses
        for name, layer in again.layers.items():
            assert torch.equal(layer.A, whole.layers[name].A)
            assert torch.equal(layer.B, whole.layers[name].B)

    def test_batches_of_the_user(self, tmp_path: Path) -> None:
        calls = []

        def batches():
            calls.append(1)
            return [token_batch(seed=seed) for seed in range(2)]

        first, _ = self.train(tmp_path / "a", lorank.BalancedLoRA(), train_batches=batches)
        second, _ = self.train(tmp_path / "b", lorank.BalancedLoRA(), train_batches=batches())
        assert len(calls) == 2
        assert first.history[0].ranks == second.history[0].ranks

    def test_a_stream_is_refused_with_the_remedy(self, tmp_path: Path) -> None:
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(rows(24, seed=0))

        with pytest.raises(ValidationBatchError, match=r"is a Stream, whose rows cannot be drawn\. .*train_batches=\["):
            self.train(tmp_path, lorank.BalancedLoRA(), Stream())
        ranks, _ = self.train(tmp_path, lorank.BalancedLoRA(init="default"), Stream())
        assert ranks.finished
