"""Damaged files, by the thousand: everything that lorank reads must be read, or refused by an error of its own.

    python -m tests.fuzz history --minutes 20

Each kind starts from files that lorank or PEFT wrote and changes them: bytes, values, structure. Hypothesis makes the
choices. What counts as a finding is any other exception, or a case that takes longer than ``SLOW`` seconds. Findings
are printed, written to ``--out``, and the process ends with status 1. The cases of past findings are in
``tests/corpus`` and are read first.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
SLOW = 20.0


@dataclass(frozen=True)
class Kind:
    """What is damaged.

    Args:
        suffix: of a case's file.
        seeds: valid cases, as bytes.
        damage: a new case from one of them.
        read: reads a case from a file; returns quietly or raises one of lorank's errors.
    """

    suffix: str
    seeds: list[bytes]
    damage: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], None]


@dataclass
class Tally:
    """What came of the cases so far."""

    cases: int = 0
    clean: int = 0
    refused: int = 0
    findings: int = 0


def judge(kind: Kind, path: Path) -> str:
    """``clean``, ``refused``, or a finding's traceback."""
    from lorank import LorankError

    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(path)
        outcome = "clean"
    except LorankError as error:
        outcome = "refused"
        if len(str(error)) > 20_000:
            return f"an error message of {len(str(error)):,} characters: {str(error)[:300]}"
    except Exception:
        return traceback.format_exc()
    taken = time.monotonic() - began
    return outcome if taken < SLOW else f"took {taken:.0f} s"


def corpus_of(kind: Kind) -> list[bytes]:
    """The cases of past findings."""
    return [file.read_bytes() for file in sorted(CORPUS.glob(f"*{kind.suffix}"))]


class _Over(KeyboardInterrupt):
    """The time is over: Hypothesis lets nothing else through."""


def fuzz(
    kind: Kind, folder: Path, *, seconds: float, first_seed: int = 0, out: Path | None = None, cases: int = 10**9
) -> Tally:
    """Reads damaged cases until the time is over or so many were read; the valid files and the corpus first.

    Args:
        folder: for the case that is being read.
        out: where findings go, one file each with its traceback; None: nowhere.
    """
    tally, seen = Tally(), set[tuple[str, str]]()
    path, began = folder / f"case{kind.suffix}", time.monotonic()
    corpus = corpus_of(kind)
    sources = [*kind.seeds * 3, *corpus]  # what was bad once is near what will be bad next

    def over() -> bool:
        return time.monotonic() - began >= seconds or tally.cases >= cases

    def read(data: bytes) -> str:
        path.write_bytes(data)
        outcome = judge(kind, path)
        tally.cases += 1
        tally.clean += outcome == "clean"
        tally.refused += outcome == "refused"
        if outcome not in ("clean", "refused"):
            tally.findings += 1
            lines = outcome.strip().splitlines()
            key = (lines[-1][:60], lines[-3] if len(lines) > 2 else "")
            if key not in seen:
                seen.add(key)
                print(f"finding {len(seen)} after {tally.cases} cases:\n{outcome[-2500:]}", flush=True)
                if out is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    (out / f"finding{len(seen)}{kind.suffix}").write_bytes(data)
                    (out / f"finding{len(seen)}{kind.suffix}.txt").write_text(outcome)
        return outcome

    for data in kind.seeds:
        outcome = read(data)
        assert outcome == "clean", f"a valid file was not read: {outcome}"
    for data in corpus:
        read(data)
    for number in itertools.count(first_seed):

        @seed(number)
        @settings(
            max_examples=1000,
            deadline=None,
            database=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.randoms(use_true_random=False))
        def many(draw: random.Random) -> None:
            if over():
                raise _Over
            read(kind.damage(draw, draw.choice(sources)))

        try:
            many()
        except _Over:
            return tally
    raise AssertionError("unreachable")


def main() -> None:
    from tests.fuzz_kinds import KINDS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for findings")
    arguments = parser.parse_args()
    import tempfile

    import torch

    torch.set_num_threads(1)
    kind, began = KINDS[arguments.kind](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(kind, Path(folder), seconds=60 * arguments.minutes, first_seed=arguments.seed, out=arguments.out)
    print(f"{arguments.kind}: {tally} in {(time.monotonic() - began) / 60:.1f} minutes, seed {arguments.seed}")
    sys.exit(bool(tally.findings))


if __name__ == "__main__":
    main()
