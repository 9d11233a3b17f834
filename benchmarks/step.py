"""Measures time and memory of one training step of every method:  python -m benchmarks.step [--help]

    floor        the frozen model with one trainable bias at its input: the lowest cost that any adapter can have
    PEFT …       PEFT's LoRA and DoRA; PEFT's AdaLoRA with update_and_allocate in every step
    the others   lorank's methods with the public lorank.attach and its defaults

Models have random weights. All linear maps except the head are adapted, with the same number of ranks for all methods
(ARD-LoRA: about the same number of parameters). A step is forward, backward, AdamW, and all work of a method between
allocations. Everything runs in one process, in turns. A ratio is the median over the turns of the quotient within one
turn.

    saved        tensors that autograd keeps between forward and backward, without parameters, MiB
    peak         the peak memory during a step, minus the memory before the step, MiB

On a GPU, add --device cuda: weights in bf16, time from CUDA events, memory from CUDA's allocator. There, --shapes 8B
with --base nf4 is a Llama of 8 billion parameters.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports

from benchmarks.contenders import RANK, Base, Contender, contenders  # noqa: E402
from benchmarks.measuring import Seconds, interleaved, peak_mib, ratio, saved_mib  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402

THEIRS = {"DoRA": "PEFT DoRA", "AdaLoRA": "PEFT AdaLoRA"}
"""PEFT's version of a method. All other methods are compared with PEFT's LoRA."""
PLAIN = ("floor", "PEFT LoRA", "PEFT DoRA", "PEFT AdaLoRA")


@dataclass
class Measured:
    """The measurements of all contenders for one shape and one dropout."""

    seconds: Seconds
    saved: dict[str, float]
    peak: dict[str, float]
    parameters: dict[str, int]

    def saved_ratio(self, name: str, reference: str) -> float:
        return self.saved[name] / self.saved[reference]


def measure(base: Base, dropout: float, turns: int) -> Measured:
    runs = contenders(base, dropout)
    saved = {name: saved_mib(run.model, _forward(run)) for name, run in runs.items()}
    for run in runs.values():
        run()  # the first step makes the optimiser's state
    peak = {name: peak_mib(run, base.device) for name, run in runs.items()}
    seconds = interleaved(runs, turns, base.device)
    return Measured(seconds, saved, peak, {name: run.parameters for name, run in runs.items()})


def _forward(run: Contender):
    return lambda: run.model(**run.batch).loss


COLUMNS = "shape, dropout, , ms, / floor, / PEFT LoRA, / PEFT's own, / static, saved, / PEFT's, peak, / PEFT's, trained"
HEADER = f"| {COLUMNS.replace(', ', ' | ')} |"


def line(shape: str, dropout: float, name: str, found: Measured) -> str:
    peer = THEIRS.get(name, "PEFT LoRA")
    ours = name not in PLAIN
    cells = [
        f"{1000 * statistics.median(found.seconds[name]):.0f}",
        f"{ratio(found.seconds, name, 'floor'):.3f}",
        f"{ratio(found.seconds, name, 'PEFT LoRA'):.3f}",
        f"{ratio(found.seconds, name, peer):.3f}" if name in THEIRS else "",
        f"{ratio(found.seconds, name, 'static'):.3f}" if ours and name != "DoRA" else "",
        f"{found.saved[name]:.1f}",
        f"{found.saved_ratio(name, peer):.2f}" if ours else "",
        f"{found.peak[name]:.1f}",
        f"{found.peak[name] / found.peak[peer]:.2f}" if ours else "",
        f"{found.parameters[name]:,}",
    ]
    return f"| {shape} | {dropout:g} | {name} | " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class Bar:
    """An upper bound for a ratio.

    Args:
        what: the ratio in words.
        name, reference: the two contenders of the ratio.
        dropout: measured with dropout, or without.
        most: the bound.
        saved: the ratio of saved bytes; else of time.
        largest: measured on the largest shape only.
    """

    what: str
    name: str
    reference: str
    dropout: bool
    most: float
    saved: bool = False
    largest: bool = False


BARS = (
    Bar("static / PEFT LoRA", "static", "PEFT LoRA", False, 0.95),
    Bar("static / PEFT LoRA", "static", "PEFT LoRA", True, 0.92),
    Bar("static / floor, largest shape", "static", "floor", False, 1.08, largest=True),
    Bar("DoRA / PEFT DoRA", "DoRA", "PEFT DoRA", False, 0.85),
    Bar("DoRA / PEFT DoRA", "DoRA", "PEFT DoRA", True, 0.6),
    Bar("saved: static / PEFT LoRA", "static", "PEFT LoRA", False, 1.0, saved=True),
    Bar("saved: static / PEFT LoRA", "static", "PEFT LoRA", True, 0.7, saved=True),
)


def verdicts(found: dict[tuple[str, float], Measured]) -> list[str]:
    """One line per bar; a bar is met if every shape meets it."""
    lines = ["| bar | dropout | at most | " + " | ".join(dict.fromkeys(shape for shape, _ in found)) + " | |"]
    lines.append("|---|---|---|" + "---|" * len({shape for shape, _ in found}) + "---|")
    largest = [shape for shape in SHAPES if any(shape == seen for seen, _ in found)][-1]
    for bar in BARS:
        cells, held = [], []
        for shape in dict.fromkeys(shape for shape, _ in found):
            values = [
                one.saved_ratio(bar.name, bar.reference) if bar.saved else ratio(one.seconds, bar.name, bar.reference)
                for (seen, dropout), one in found.items()
                if seen == shape and (dropout > 0) == bar.dropout and (shape == largest or not bar.largest)
            ]
            cells.append(f"{max(values):.3f}" if values else "")
            held += [value <= bar.most + 5e-4 for value in values]
        if held:
            verdict = "met" if all(held) else "missed"
            dropouts = "yes" if bar.dropout else "no"
            lines.append(f"| {bar.what} | {dropouts} | {bar.most:g} | {' | '.join(cells)} | {verdict} |")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["S", "M", "L"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--base", choices=["plain", "nf4"], default="plain", help="nf4: 4 bits, needs bitsandbytes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[tuple[str, float], Measured]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lorank").setLevel(logging.ERROR)  # no warning that no rank moves: it is intended here
    dtype = torch.float32 if options.device.type == "cpu" else torch.bfloat16
    print(
        f"{options.device}, {options.threads} thread(s), {str(dtype).removeprefix('torch.')}, base {options.base}, "
        f"{options.turns} turns, rank {RANK}\n\n{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}"
    )
    found: dict[tuple[str, float], Measured] = {}
    for shape in options.shapes:
        for dropout in options.dropouts:
            base = Base(SHAPES[shape], options.device, dtype, options.base)
            one = found[shape, dropout] = measure(base, dropout, options.turns)
            for name in one.seconds:
                print(line(shape, dropout, name, one), flush=True)
    print("\n" + "\n".join(verdicts(found)), flush=True)
    return found


if __name__ == "__main__":
    main()
