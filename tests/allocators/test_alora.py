"""ALoRA's schedule and its settings."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lorank.allocators import ALoRA, Context, StaticLoRA, TrainingInfo
from lorank.errors import ScheduleError
from lorank.lora import find_layers, resize_
from lorank.scoring import ablation_scores, first_order_scores
from lorank.training import attach
from tests.allocators.runs import adamw, same_run
from tests.models import adapted, tiny_llama, token_batch


class TestSchedule:
    @pytest.mark.parametrize("per_epoch", [None, 10, 1000, 5000])
    def test_by_default_eight_rounds_come_in_the_first_half_of_a_run_of_any_length(self, per_epoch) -> None:
        run = TrainingInfo(total_steps=1000, steps_per_epoch=per_epoch)
        assert ALoRA().schedule(run) == [100, 157, 214, 271, 328, 385, 442, 499]
        assert ALoRA().schedule(TrainingInfo(20, per_epoch)) == [2, 3, 4, 5, 6, 7, 8, 9]
        assert ALoRA().schedule(TrainingInfo(3, per_epoch)) == [1, 2]

    def test_fractions_of_the_run(self) -> None:
        assert ALoRA(k1=0.25, k2=0.125, rounds=3).schedule(TrainingInfo(total_steps=400)) == [100, 150, 200]

    @pytest.mark.parametrize("name", ["k1", "k2"])
    def test_an_epoch_given_as_a_fraction_is_refused(self, name: str) -> None:
        with pytest.raises(ScheduleError, match=rf"ALoRA\({name}=1\): expected a fraction of the run.*unit='epochs'"):
            ALoRA(**{name: 1})
        assert ALoRA(**{name: 1}, unit="epochs").schedule(TrainingInfo(1000, steps_per_epoch=100))

    def test_the_papers_epochs(self) -> None:
        """K1 = 1 epoch, K2 = 0.25 epoch, at most 8 rounds."""
        schedule = ALoRA(unit="epochs").schedule(TrainingInfo(total_steps=1000, steps_per_epoch=100))
        assert schedule == [100, 125, 150, 175, 200, 225, 250, 275]

    def test_rounds_at_or_after_the_last_step_are_left_out(self) -> None:
        assert ALoRA(unit="epochs").schedule(TrainingInfo(total_steps=175, steps_per_epoch=100)) == [100, 125, 150]

    def test_without_epochs_the_run_counts_as_ten(self) -> None:
        assert ALoRA(rounds=2, unit="epochs").schedule(TrainingInfo(total_steps=1000)) == [100, 125]

    def test_steps(self) -> None:
        assert ALoRA(k1=7, k2=3, rounds=3, unit="steps").schedule(TrainingInfo(total_steps=100)) == [7, 10, 13]

    def test_an_epoch_shorter_than_four_steps_allocates_at_most_once_a_step(self) -> None:
        assert ALoRA(rounds=3, unit="epochs").schedule(TrainingInfo(total_steps=100, steps_per_epoch=2)) == [2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k1": 0}, r"ALoRA\(k1=0\): expected a number above 0"),
        ({"k2": -1.0}, r"ALoRA\(k2=-1\.0\): expected a number above 0"),
        ({"rounds": 0}, r"ALoRA\(rounds=0\): expected at least 1\. For plain LoRA use StaticLoRA"),
        ({"per_round": 0}, r"per_round=0\): expected a whole number of at least 1, or None"),
        ({"unit": "hours"}, r"unit='hours'\): expected one of run, epochs, steps"),
        ({"terms": "neither"}, "expected one of both, without, alone"),
        ({"engine": "magic"}, "expected one of exact, reference"),
        ({"scores": "guess"}, r"scores='guess'\): expected one of first_order, exact, screen, balanced"),
        ({"new_ranks": "best"}, "expected one of random, gradient"),
        ({"second_moments": "one"}, "expected one of zero, mean"),
        ({"scores": "balanced", "terms": "alone"}, "terms belongs to the scores by ablation"),
        ({"scores": "balanced", "engine": "reference"}, "engine belongs to the scores by ablation"),
        ({"scores": "balanced", "samples": 64}, "samples belongs to the scores by ablation"),
        ({"scores": "balanced", "rotate": True}, "balanced scores are in their own basis already"),
        ({"scores": "random", "rotate": True}, "random scores need no basis"),
        ({"scores": "random", "terms": "alone"}, "belongs to the scores by ablation"),
        ({"per_parameter": True}, r"Give terms='without' or 'alone', or scores='balanced'"),
        ({"samples": 0}, r"samples=0\): expected a whole number of at least 1, or None"),
    ],
)
def test_settings_out_of_range(settings, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        ALoRA(**settings)


def test_pruning_everything_is_refused_before_training() -> None:
    layers = find_layers(adapted(tiny_llama(), r=1))
    with pytest.raises(ScheduleError, match=r"would prune n_A = 14 ranks .* have 14 in all"):
        ALoRA(per_round=14).start(layers, TrainingInfo(total_steps=10))
    assert ALoRA(per_round=13).start(layers, TrainingInfo(total_steps=10)) == {}


@pytest.mark.parametrize(
    ("rank", "budget", "pruned"),
    [(8, None, 14), (2, None, 4), (1, None, 2), (1, "112 ranks", 14), (8, "28 ranks", 4), (8, "3 ranks", 1)],
)
def test_a_round_prunes_an_eighth_of_the_ranks(rank: int, budget: str | None, pruned: int) -> None:
    """At the paper's rank of 8, one per module: 14 modules here."""
    model = adapted(tiny_llama(), r=rank)
    ranks = attach(
        model, adamw(model), ALoRA(budget=budget), validation_batch=token_batch(), total_steps=10, progress=False
    )
    before = dict(ranks.layers.ranks)
    model(**token_batch()).loss.backward()
    ranks.optimizer.step()
    (record,) = ranks.history.allocations
    assert sum(max(0, before[name] - rank) for name, rank in record.ranks.items()) == pruned


@pytest.mark.parametrize(("scores", "score"), [("exact", ablation_scores), ("first_order", first_order_scores)])
@pytest.mark.parametrize("terms", ["both", "without"])
def test_ranks_are_scored_as_asked(scores, score, terms) -> None:
    model = adapted(tiny_llama(), r=2)
    layers, batch = find_layers(model), token_batch(padded=True)
    allocation = ALoRA(scores=scores, terms=terms).allocate(
        Context(step=1, run=TrainingInfo(10), model=model, layers=layers, validation_batch=batch), {}
    )
    expected = score(model, layers, batch, terms=terms)
    assert all((allocation.scores[name] == values).all() for name, values in expected.scores.items())
    counts = {
        ("exact", "both"): (57, 0),  # M, and 28 ranks twice
        ("exact", "without"): (29, 0),
        ("first_order", "both"): (0, 2),
        ("first_order", "without"): (0, 1),
    }
    details = allocation.details
    assert details["scored_by"] == scores
    assert (details["evaluations"], details["backward_passes"]) == counts[scores, terms]


def test_rounds_that_shrink_the_total_stop_before_the_last_rank() -> None:
    """With as many to prune as there are ranks but one, nobody is left to receive, and the next round has too few."""
    model = adapted(tiny_llama(), r=2, target_modules=["q_proj", "v_proj"])
    allocator = ALoRA(per_round=7, k1=1, k2=1, unit="steps", rounds=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = attach(model, optimizer, allocator, validation_batch=token_batch(), total_steps=4)
    totals = []
    for step in range(4):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(ranks.layers.total_rank)
    assert min(totals) >= 1
    assert totals[0] == 1, "the first round did not shrink it: this test shows nothing"
    assert len(ranks.history.allocations) == 3


def test_screened_scores_prune_what_exact_ones_do() -> None:
    model = adapted(tiny_llama(), r=4)
    layers, batch = find_layers(model), token_batch(padded=True)
    context = Context(step=1, run=TrainingInfo(10), model=model, layers=layers, validation_batch=batch)
    screened, exact = (ALoRA(scores=scores, per_round=5).allocate(context, {}) for scores in ("screen", "exact"))
    assert {name: change.keep for name, change in screened.plan.items() if len(change.keep) < 4} == {
        name: change.keep for name, change in exact.plan.items() if len(change.keep) < 4
    }
    assert screened.details["scored_by"] == "screen"
    assert screened.details["backward_passes"] == 2


def test_how_many_samples_a_method_asks_for() -> None:
    assert StaticLoRA().validation_samples == ALoRA(scores="exact").validation_samples == 32
    assert ALoRA(scores="screen").validation_samples == 32
    assert ALoRA().validation_samples == ALoRA(scores="first_order").validation_samples == 128
    assert ALoRA(scores="exact", samples=5).validation_samples == 5


def test_random_scores_are_drawn_from_the_seed_and_the_step() -> None:
    def ranks(seed: int) -> list[dict[str, int]]:
        model = adapted(tiny_llama())
        run = attach(model, adamw(model), ALoRA(**ROUNDS, scores="random"), total_steps=9, seed=seed)
        for step in range(9):
            model(**token_batch(seed=step)).loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.detach()
        first, second = (
            torch.cat([torch.as_tensor(v) for v in record.scores.values()]) for record in run.history.allocations[:2]
        )
        assert first.min() >= 0
        assert first.max() < 1
        assert not set(first.tolist()) & set(second.tolist())
        return [dict(record.ranks) for record in run.history.allocations]

    assert ranks(3) == ranks(3)
    assert ranks(3) != ranks(4)


def test_samples_of_the_users_choice_also_give_the_gradient() -> None:
    gradient = {"scores": "balanced", "new_ranks": "gradient"}
    assert ALoRA(**gradient, samples=40).validation_samples == 40
    assert ALoRA(**gradient).validation_samples == 128
    assert ALoRA(scores="exact", new_ranks="gradient").validation_samples == 128
    assert ALoRA(scores="exact", rotate=True).validation_samples == 32


ROUNDS = {"k1": 2, "k2": 2, "rounds": 2, "unit": "steps"}
OPTIONS = {
    "balanced": {"scores": "balanced", "per_parameter": True, "new_ranks": "gradient", "second_moments": "mean"},
    "rotated": {"rotate": True, "terms": "without", "per_parameter": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_with_options_is_the_uninterrupted_one(name: str) -> None:
    for stop in (1, 3):
        same_run(ALoRA(**ROUNDS, **OPTIONS[name]), stop, 6)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_change_of_basis_changes_the_output_by_what_is_pruned_only(name: str) -> None:
    """The live model after the round, against the model before it without the pruned ranks of the turned layers."""
    model = adapted(tiny_llama()).double()
    ranks = attach(model, adamw(model), ALoRA(**ROUNDS, **OPTIONS[name]), validation_batch=token_batch(), total_steps=9)
    plans = []
    original = type(ranks.allocator).allocate

    def allocate(self: ALoRA, context: Context, state: dict[str, torch.Tensor]) -> object:
        found = original(self, context, state)
        twin = copy.deepcopy(model)
        resize_(find_layers(twin), {name: replace(change, add=0) for name, change in found.plan.items()})
        plans.append((twin.eval()(**token_batch(seed=7)).logits, found.plan))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ranks.allocator), "allocate", allocate)
        for step in range(2):
            model(**token_batch(seed=step)).loss.backward()
            ranks.optimizer.step()
            ranks.optimizer.zero_grad()
    ((expected, plan),) = plans
    assert any(change.basis is not None for change in plan.values())
    assert any(change.add for change in plan.values())
    torch.testing.assert_close(model.eval()(**token_batch(seed=7)).logits, expected)
    ranks.detach()


def test_balanced_scores_are_those_of_the_passes_since_the_last_round() -> None:
    """The first round's scores, against Gramians of the same passes in the same order, by stored z and gradients."""
    model = adapted(tiny_llama(), lora_dropout=0.0)
    twin = copy.deepcopy(model)
    ranks = attach(
        model, adamw(model), ALoRA(**ROUNDS, scores="balanced"), validation_batch=token_batch(), total_steps=9
    )
    optimizer = adamw(twin)
    layers = find_layers(twin)
    z: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.module.lora_A["default"].register_forward_hook(
            lambda m, i, out, name=name: (out.retain_grad(), z[name].append(out))[0]
        )
    for step in range(2):
        for one, own in ((model, ranks.optimizer), (twin, optimizer)):
            one(**token_batch(seed=step)).loss.backward()
            own.step()
            own.zero_grad()
    first = ranks.history.allocations[0].scores
    # the last position has no label: in the last block its gradient is zero, or rounding
    counted = {
        name: [part.grad.abs().amax(-1) > 1e-5 * part.grad.abs().max() for part in parts] for name, parts in z.items()
    }
    tokens = max(sum(int(own.sum()) for own in some) for some in counted.values())
    for name, parts in z.items():
        values = torch.cat([part.detach()[own] for part, own in zip(parts, counted[name], strict=True)]).double()
        slopes = torch.cat([part.grad[own] for part, own in zip(parts, counted[name], strict=True)]).double()
        Z, D = values.T @ values / len(values), slopes.T @ slopes * (tokens / 2) / 2
        expected = torch.linalg.eigvals(Z @ D).real.sort(descending=True).values
        torch.testing.assert_close(torch.tensor(first[name]).double(), expected, rtol=2e-3, atol=1e-9)
    ranks.detach()
