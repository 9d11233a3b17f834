"""The table of docs/distributed.md, measured.

    python -m tests.training.parallel.processes_table --count 2 4 --wrap ddp zero3

Every method in every form of distributed training, with accumulation and gradient checkpointing, next to one process
with the same global batch. Exits with 1 where a row is not as it should be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from tests.training.parallel.processes_run import METHODS, STEPS, Case, Seen, launch, run

WRAPS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
REFUSED = dict.fromkeys(("zero1", "zero2"), ("ard-heads",)) | {
    "zero3": ("ard-heads", "alora-dnas", "alora-options", "alora-first-order", "balanced")
}
LOSSES, SCORES = 1e-5, 1e-4
"""How far losses and scores of several processes may be from those of one, relative to the largest."""


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest difference, relative to the largest of ``theirs``; infinite where they are not as many."""
    if len(ours) != len(theirs):
        return float("inf")
    largest = max(map(abs, theirs), default=0.0) or 1.0
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0) / largest


def flat(scores: list[list[float]]) -> list[float]:
    return [score for one in scores for score in one]


def case_of(method: str, wrap: str) -> Case:
    """DeepSpeed computes in float32, and clips after a method has seen gradients: there, nothing is clipped then."""
    if not wrap.startswith("zero"):
        return Case(method, wrap)
    return Case(method, wrap, dtype="float32", clip=0.0 if METHODS[method]().sees_gradients else 1.0)


def row(case: Case, together: list[Seen], alone: Seen) -> tuple[str, bool]:
    """A line of the table, and whether it is as it should be."""
    first = together[0]
    equal = len(first.hashes) == STEPS and all(one.hashes == first.hashes for one in together)
    ranks = first.ranks == alone.ranks
    losses, scores = apart(first.losses, alone.losses), apart(flat(first.scores), flat(alone.scores))
    cells = [case.wrap, str(len(together)), case.method, str(first.allocations), "yes" if equal else "NO"]
    cells += ["yes" if ranks else "NO", f"{losses:.0e}", f"{scores:.0e}"]
    good = not first.error and equal and ranks and losses <= LOSSES and scores <= SCORES
    return f"| {' | '.join(cells)} |" + (f" {first.error}" if first.error else ""), good


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--wrap", nargs="+", default=list(WRAPS), choices=WRAPS)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = [
        case_of(method, wrap)
        for wrap in arguments.wrap
        for method in arguments.method
        if method not in REFUSED.get(wrap, ())
    ]
    all_good = True
    with tempfile.TemporaryDirectory() as scratch:
        alone = {}
        for case in cases:
            if (case.method, case.dtype) not in alone:
                alone[case.method, case.dtype] = run(replace(case, wrap="none"), Path(scratch), 0, 1)
        print("| by | processes | method | allocations | equal hashes | ranks of one | losses | scores |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for count in arguments.count:
            seen = launch(Path(scratch) / str(count), cases, count)
            for case, together in zip(cases, seen, strict=True):
                line, good = row(case, together, alone[case.method, case.dtype])
                all_good &= good
                print(line, flush=True)
    sys.exit(not all_good)


if __name__ == "__main__":
    main()
