"""Do Gramians of sampled labels choose better ranks?   python -m benchmarks.sampled_gramians planted --until 0.6

BalancedLoRA sums up the gradients of training itself, with the labels of the data: the empirical Fisher metric. Where a
model fits its data exactly, those gradients are 0, and say nothing of what a change would cost. This is so on the
planted problem, whose loss is an error without noise, and not in language modelling. The Fisher metric proper draws the
labels from the model's own distribution. Here it is measured before every cut, on a few batches of training data.

One run of BalancedLoRA, with drawn labels or (``--data``) with those of the data, prints its losses as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from torch import Tensor, nn  # noqa: E402

import lorank  # noqa: E402
from benchmarks.quality import CASES, METHODS, Method, Run, order_of, task_of, train  # noqa: E402
from lorank.allocators.base import Context, State  # noqa: E402
from lorank.experiments.planted.methods import uniform  # noqa: E402
from lorank.experiments.planted.problem import Problem, Scenario, last_hidden, make_problem  # noqa: E402
from lorank.experiments.planted.student import train_student  # noqa: E402
from lorank.scoring import BalancedScorer, Choose, Scores, balance, measure_gramians  # noqa: E402
from lorank.tasks.collate import IGNORED  # noqa: E402

BATCHES, ROWS = 8, 8
"""Batches for the Gramians, and their rows."""

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class SampledScorer(BalancedScorer):
    """σ² from Gramians that are measured at the cut.

    Args:
        batches: the batches.
        loss: their loss, with labels that it draws.
    """

    batches: Sequence[Mapping[str, Any]] = ()
    loss: Loss | None = None

    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        with torch.random.fork_rng():
            torch.manual_seed(1_234 + context.step)
            pairs = measure_gramians(context.model, context.layers, self.batches, loss_fn=self.loss)
        found = {name: balance(context.layers[name], pair) for name, pair in pairs.items()}
        values, bases = ({name: getattr(one, key) for name, one in found.items()} for key in ("worth", "basis"))
        return Scores(values, {"gramians": "drawn labels"}, bases)


def balanced_with(scorer: BalancedScorer | None, **settings: Any) -> lorank.BalancedLoRA:
    """BalancedLoRA that takes its scores from a scorer; None: from its own."""

    class Sampled(lorank.BalancedLoRA):
        @property
        def _scorer(self) -> BalancedScorer:
            return scorer or super()._scorer

    return Sampled(**settings)


def planted_loss(problem: Problem) -> Loss:
    """The planted loss against the student's own output and noise: the negative log-likelihood of a drawn target."""

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        output = last_hidden(model, batch["input_ids"]) @ problem.readout
        return (output - output.detach() - torch.randn_like(output)).square().sum(-1).mean() / problem.size

    return loss


def label_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy with labels drawn from the model's own distribution, at the places that have a label."""
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
    if labels.dim() > 1:  # next tokens, not classes
        logits = logits[:, :-1][labels[:, 1:] != IGNORED]
    drawn = torch.distributions.Categorical(logits=logits.detach()).sample()  # type: ignore[no-untyped-call]  # torch
    return nn.functional.cross_entropy(logits, drawn)


def run_planted(seed: int, lr: float, data: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    problem = make_problem(Scenario(), seed)
    rows = problem.batch("train")
    batches = [{key: value[i * ROWS : (i + 1) * ROWS] for key, value in rows.items()} for i in range(BATCHES)]
    scorer = None if data else SampledScorer(batches, planted_loss(problem))
    allocator = balanced_with(scorer, budget=f"{problem.budget} ranks", **settings)
    outcome = train_student(problem, uniform(problem), allocator, lr=lr)
    return {"selection": outcome.selection, "test": outcome.test, "overlap": outcome.overlap}


def run_task(name: str, seed: int, lr: float, data: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    task = task_of(name)
    orders = order_of(len(task.train), ROWS, BATCHES, seed + 5)
    batches = [task.collator([task.train[i] for i in rows]) for rows in orders]
    scorer = None if data else SampledScorer(batches, label_loss)
    METHODS["sampled"] = Method("", lambda: balanced_with(scorer, **settings), batches=True)
    with tempfile.TemporaryDirectory() as folder:
        line = train(Run(name, "sampled", 200, lr, seed), Path(folder))
    return {key: line[key] for key in ("selection", "parameters")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["planted", *CASES])
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--data", action="store_true", help="the labels of the data, as BalancedLoRA has them")
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("--until", type=float, default=0.3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"cuts": given.cuts, "until": given.until}
    if given.task == "planted":
        found = run_planted(given.seed, given.lr, given.data, settings)
    else:
        found = run_task(given.task, given.seed, given.lr, given.data, settings)
    print(json.dumps({**vars(given), **found}))


if __name__ == "__main__":
    main()
