"""Every end of a run leaves plain LoRA; the next run of an adapter is a retry, a new run, or refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lorank
from lorank.errors import LorankError
from lorank.lora import AdapterLayers, find_layers
from lorank.testing import plain_peft
from tests.messages import warnings_of_lorank
from tests.methods import METHODS, STEPS
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw
from tests.training.trainer_run import rows

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

GATED = ["adalora", "sora", "alora-dnas", "ard", "ard-heads"]


def attach(model: nn.Module, method: str, optimizer: Any = None, **options: Any) -> lorank.Ranks:
    return lorank.attach(
        model,
        adamw(model) if optimizer is None else optimizer,
        METHODS[method].make(),
        validation_batch=token_batch(seed=9),
        total_steps=STEPS,
        **options,
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for step in range(steps):
        model(**token_batch(seed=20 + step % 3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**token_batch(seed=5)).logits
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def assert_plain(layers: AdapterLayers) -> None:
    for name, layer in layers.items():
        assert layer.module.lora_variant == {}, name
        assert layer.module.lora_A[layer.adapter].weight.shape == (layer.rank, layer.d_in)
        assert layer.module.lora_B[layer.adapter].weight.shape == (layer.d_out, layer.rank)


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_detached_leaves_plain_lora_with_the_same_outputs_and_a_retry_goes_on_from_it(
    method: str, steps: int, tmp_path: Path
) -> None:
    model = adapted(tiny_llama(), random_B=False)
    made_with = find_layers(model).ranks
    optimizer = adamw(model)
    first = attach(model, method, optimizer)
    train(model, optimizer, steps)
    live = logits(model)
    first.detach()
    assert_plain(find_layers(model))
    assert_same(logits(model), live)
    model.save_pretrained(tmp_path / "adapter")
    left = find_layers(model).ranks
    second = attach(model, method)
    assert_same(logits(model), live)
    assert second.info.initial_ranks == made_with
    assert first.budget == second.budget
    if steps and method != "ard-heads":  # a rank of a head is one of the module's after it is merged, too
        assert second.layers.ranks == left
    if steps:
        tiny_llama().save_pretrained(tmp_path / "base")
        found = plain_peft().logits(tmp_path / "base", tmp_path / "adapter", token_batch(seed=5))
        for reloaded in found.values():
            assert_same(reloaded, live)


@pytest.mark.parametrize("method", ["sora", "adalora"])
def test_retries_do_not_halve_the_budget_again_and_a_finished_run_is_a_new_start(method: str) -> None:
    model = adapted(tiny_llama(), random_B=False)
    for _ in range(2):  # interrupted twice, after the budget was met
        optimizer = adamw(model)
        ranks = attach(model, method, optimizer)
        train(model, optimizer, STEPS - 2)
        ranks.detach()
        assert ranks.layers.total_rank == 28  # half of 14 · 4
    optimizer = adamw(model)
    attach(model, method, optimizer)
    train(model, optimizer, STEPS)
    assert find_layers(model).total_rank == 28
    optimizer = adamw(model)
    again = attach(model, method, optimizer)  # the first has finished, and needs no detach
    assert sum(again.info.initial_ranks.values()) == 28
    train(model, optimizer, STEPS)
    assert find_layers(model).total_rank == 14


def test_modules_that_a_second_run_brings_back_are_in_its_files(tmp_path: Path) -> None:
    """The first run has written the others only to the LoraConfig, from which the second has read its modules."""
    model = adapted(tiny_llama(), random_B=False)
    for method, options in (("sora", {}), ("static", {"budget": 4})):
        optimizer = adamw(model)
        ranks = lorank.attach(model, optimizer, METHODS[method].make(**options), total_steps=STEPS)
        train(model, optimizer, STEPS)
        ranks.detach()
        assert (0 in ranks.layers.ranks.values()) == (method == "sora")
    model.save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    for reloaded in plain_peft().logits(tmp_path / "base", tmp_path / "adapter", token_batch(seed=5)).values():
        assert_same(reloaded, logits(model))


def test_a_retry_is_announced_in_one_line() -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    ranks = attach(model, "sora", optimizer)
    train(model, optimizer, 7)
    ranks.detach()
    with warnings_of_lorank() as heard:
        attach(model, "sora")
    assert len(heard) == 1
    assert "(SoRA) stopped before its end. This run is a retry: it has that run's initial 56 ranks" in heard[0]


def test_another_method_after_an_untrained_run_begins_with_the_adapters_own_ranks() -> None:
    """The first run only made the layers wider (5 ranks for each of the heads), and trained nothing."""
    model = adapted(tiny_llama(), random_B=False)
    attach(model, "ard-heads").detach()
    assert find_layers(model).total_rank > 56
    assert set(attach(model, "alora").layers.ranks.values()) == {4}


@pytest.mark.parametrize("method", GATED)
def test_a_run_that_was_garbage_collected_leaves_nothing_that_moves_the_outputs(method: str) -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    ranks = attach(model, method, optimizer)
    train(model, optimizer, 7)
    live, made_with = logits(model), ranks.info.initial_ranks
    handles = ranks._hooks.pop_all()  # as if every hook were gone together with the optimiser
    lorank.training.attached_runs.remove(ranks)
    del ranks, optimizer
    gc.collect()
    second = attach(model, method)
    assert_same(logits(model), live)
    assert second.info.initial_ranks == made_with
    handles.pop_all()


@pytest.mark.parametrize("method", ["adalora", "ard-heads"])
def test_an_exception_in_the_loop_leaves_a_run_that_can_be_detached(method: str) -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    ranks = attach(model, method, optimizer)

    def steps() -> Any:
        while True:
            train(model, optimizer, 1)
            yield

    loop = steps()
    for _ in range(6):
        next(loop)
    loop.close()  # GeneratorExit
    live = logits(model)
    ranks.detach()
    ranks.detach()  # no effect
    assert_plain(ranks.layers)
    assert_same(logits(model), live)
    train(model, optimizer, 2)  # plain LoRA goes on with the same optimiser
    assert ranks.step == 6
    live = logits(model)
    for too_late in (ranks.finish, lambda: ranks.load_state_dict({})):
        with pytest.raises(LorankError, match=r"after ranks\.detach\(\): the run has ended at step 6 of 12"):
            too_late()
    assert_same(logits(model), live)


@pytest.mark.parametrize("given", ["the same model", "the base model", "another optimiser"])
def test_a_second_run_of_an_adapter_is_refused_and_changes_nothing(given: str) -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    first = attach(model, "sora", optimizer)
    train(model, optimizer, 3)
    live = logits(model)
    again: Any = model.get_base_model() if given == "the base model" else model
    with pytest.raises(LorankError, match=r"has a run already, at step 3, .*ranks\.detach\(\).*replace=True"):
        attach(again, "sora", adamw(model) if given == "another optimiser" else optimizer)
    assert torch.equal(logits(model), live)
    assert first.attached
    train(model, optimizer, STEPS - 3)
    assert first.finished
    assert [record.step for record in first.history] == [0, 2, 4, 6]


def test_a_second_run_takes_the_place_of_the_first_when_asked() -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    first = attach(model, "sora", optimizer)
    train(model, optimizer, 3)
    live = logits(model)
    second = attach(model, "sora", optimizer, replace=True)
    assert not first.attached
    assert_same(logits(model), live)
    train(model, optimizer, STEPS)
    assert (first.step, second.step) == (3, STEPS)
    assert find_layers(model).total_rank == 28


def test_an_optimiser_has_one_run_at_a_time() -> None:
    model = adapted(tiny_llama(), random_B=False)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    optimizer = adamw(model)
    attach(model, "sora", optimizer, adapter="default")
    with pytest.raises(LorankError, match=r"of the adapter 'default', .*: make an optimiser for each adapter"):
        attach(model, "sora", optimizer, adapter="second")


def test_two_adapters_of_a_model_have_a_run_each() -> None:
    """Both move ranks, with the fused forward as without it, and both files together are the live model."""

    def run(fused: bool) -> tuple[nn.Module, list[lorank.Ranks]]:
        model = adapted(tiny_llama(), random_B=False, target_modules=["q_proj", "v_proj"])
        model.add_adapter("second", type(model.peft_config["default"])(r=4, target_modules=["q_proj", "up_proj"]))
        model.base_model.set_adapter(["default", "second"])
        optimizers, runs = [], []
        for adapter, method in (("default", "adalora"), ("second", "sora")):
            mine = [p for name, p in model.named_parameters() if f".{adapter}." in name]
            optimizers.append(torch.optim.AdamW(mine, lr=1e-2))
            runs.append(attach(model, method, optimizers[-1], adapter=adapter, fused=fused))
        model.train()
        for step in range(STEPS):
            model(**token_batch(seed=step)).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return model, runs

    (model, runs), (plain, plain_runs) = run(fused=True), run(fused=False)
    assert [one.layers.total_rank for one in runs] == [8, 8]
    assert [one.layers.ranks for one in runs] == [one.layers.ranks for one in plain_runs]
    assert_same(logits(model), logits(plain))
    runs[0].detach()
    assert runs[1].attached
    for one in runs:
        assert_plain(one.layers)


class Failing(Trainer):
    """Training fails in the forward pass before step ``fails_before`` of the first ``times`` runs."""

    fails_before, times, error = 0, 1, KeyboardInterrupt()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == self.fails_before and self.times:
            self.times -= 1
            raise self.error
        return super().training_step(*args, **kwargs)


def failing_trainer(folder: Path, method: str, model: nn.Module, **changes: Any) -> Failing:
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-2}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, **changes}
    return Failing(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=rows(8, seed=0),
        callbacks=[lorank.RankCallback(METHODS[method].make(), validation_batch=token_batch(seed=9))],
    )


@pytest.mark.parametrize(
    ("method", "new_trainer"), [*((method, False) for method in GATED), ("adalora", True), ("ard-heads", True)]
)
def test_train_again_after_an_interrupt(method: str, new_trainer: bool, tmp_path: Path) -> None:
    """In a notebook: the cell is stopped, then train() is called again, or the cell with the Trainer runs again."""
    model = adapted(tiny_llama(), random_B=False)
    made_with = find_layers(model).ranks
    trainer = failing_trainer(tmp_path, method, model)
    trainer.fails_before = 7
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    live = logits(model)
    if new_trainer:
        trainer = failing_trainer(tmp_path, method, model)
        trainer.times = 0
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, lorank.RankCallback))
    at_start: list[Tensor] = []

    class Start(lorank.training.trainer_callback.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            at_start.append(logits(model))

    trainer.add_callback(Start())
    trainer.train()
    assert_same(at_start[0], live)
    assert callback.ranks is not None
    assert callback.ranks.info.initial_ranks == made_with
    assert_plain(find_layers(model))
    if method in ("adalora", "sora"):
        assert find_layers(model).total_rank == 28


@pytest.mark.parametrize(("method", "interrupted_at"), [("adalora", 8), ("ard-heads", 6)])
def test_an_interrupted_trainer_resumes_bitwise_from_its_checkpoint(
    method: str, interrupted_at: int, tmp_path: Path
) -> None:
    """The first run is still attached when the Trainer loads weights and optimiser."""
    models = [adapted(tiny_llama(), random_B=False) for _ in range(2)]
    for number, model in enumerate(models):
        trainer = failing_trainer(tmp_path / str(number), method, model, save_strategy="steps", save_steps=6)
        trainer.fails_before, trainer.times = interrupted_at, number
        if not number:
            trainer.train()
            continue
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train(resume_from_checkpoint=True)
    straight, resumed = (model.state_dict() for model in models)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize(("method", "before"), [("adalora", 7), ("ard-heads", 0), ("alora", 7)])
def test_a_retry_with_a_smaller_batch_has_the_budget_of_the_first_attempt(
    method: str, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_llama(), random_B=False)
    made_with = find_layers(model).ranks
    trainer = failing_trainer(tmp_path, method, model, auto_find_batch_size=True)
    trainer.fails_before, trainer.error = before, RuntimeError("CUDA out of memory.")
    trainer.train()
    assert trainer.times == 0
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, lorank.RankCallback))
    assert callback.ranks.info.initial_ranks == made_with
    assert callback.ranks.step == STEPS
    assert_plain(find_layers(model))
    if method == "adalora":
        assert find_layers(model).total_rank == 28


def test_two_callbacks_in_a_trainer_are_refused(tmp_path: Path) -> None:
    trainer = failing_trainer(tmp_path, "sora", adapted(tiny_llama(), random_B=False))
    trainer.times = 0
    trainer.add_callback(lorank.RankCallback(METHODS["alora"].make(), validation_batch=token_batch(seed=9)))
    with pytest.raises(LorankError, match=r"from another RankCallback.*pop_callback"):
        trainer.train()
