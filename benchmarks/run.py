"""Whole runs, including scoring, compared with PEFT's LoRA for as many steps:  python -m benchmarks.run [--help]

    PEFT LoRA            the reference
    PEFT AdaLoRA         starts with 1.5 times the ranks, update_and_allocate in every step
    ALoRA exact          the paper's schedule: K1 one epoch, K2 a quarter, 8 rounds, ten epochs in total; the paper's
                         scores on 32 samples
    ALoRA                the same schedule; the default scores, two backward passes over 128 samples
    AdaLoRA, SoRA        lorank's, start with 1.5 times the ranks and end with the same ranks as the others
    static               lorank's plain LoRA
    BalancedLoRA         starts with four times the ranks, and ends with as many parameters as plain LoRA

The model is the packaged tiny Llama (3 M parameters, all linear maps except the head adapted, dropout 0.05) or a shape
of benchmarks/shapes.py with random weights. Batches are random tokens, and every position has a label. All runs take
one step each in turns, so that other programs on the machine disturb them equally. The cost of a round is the median
time of steps with an allocation minus the median time of steps without.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from peft import AdaLoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import lorank  # noqa: E402
from benchmarks.contenders import Base, Batch, Contender, Maker  # noqa: E402
from benchmarks.measuring import peak_mib, seconds_of  # noqa: E402
from benchmarks.shapes import LLAMA_MAPS, SHAPES, Shape  # noqa: E402
from lorank.allocators import START_BATCHES  # noqa: E402
from lorank.experiments.models import resolve  # noqa: E402

EPOCHS = 10
REFERENCE = "PEFT LoRA"
PACKAGED = Shape(lambda: AutoModelForCausalLM.from_pretrained(resolve("tiny")), LLAMA_MAPS, 16, 64)


@dataclass
class Result:
    """The seconds of a run's steps: plain steps, and steps with an allocation.

    Attributes:
        plain: seconds of each step without an allocation.
        allocating: seconds of each step with an allocation.
        start: seconds of ``lorank.attach``.
        peak: peak memory of the second step, MiB.
    """

    plain: list[float] = field(default_factory=list)
    allocating: list[float] = field(default_factory=list)
    start: float = 0.0
    peak: float = 0.0

    @property
    def total(self) -> float:
        return self.start + sum(self.plain) + sum(self.allocating)

    @property
    def method(self) -> float:
        """The part of the run's time that is not steps: the start, and the allocations without their steps."""
        return (self.start + len(self.allocating) * (self.round or 0.0)) / self.total

    @property
    def step(self) -> float:
        return statistics.median(self.plain)

    @property
    def round(self) -> float | None:
        """Seconds of an allocation, without its step."""
        return statistics.median(self.allocating) - self.step if self.allocating else None


def batches(make: Maker, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    size, most = (make.base.shape.rows, make.base.shape.tokens), make.model.config.vocab_size
    drawn = [torch.randint(3, most, size, generator=generator).to(make.base.device) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def validation(make: Maker, rows: int) -> Batch:
    ids = torch.randint(3, make.model.config.vocab_size, (rows, make.base.shape.tokens))
    ids = ids.to(make.base.device)
    return {"input_ids": ids, "labels": ids}


def runs(make: Maker, steps: int) -> dict[str, Callable[[], Contender]]:
    """How each contender is made, by its name."""

    def attached(allocator: lorank.Allocator, rank: int) -> Contender:
        contender = Contender(make.peft(fresh=True, r=rank, lora_alpha=rank), make.batch)
        began = time.perf_counter()
        contender.ranks = lorank.attach(
            contender.model,
            contender.optimizer,
            allocator,
            total_steps=steps,
            steps_per_epoch=steps / EPOCHS,
            validation_batch=validation(make, allocator.validation_samples),
            train_batches=batches(make, START_BATCHES),
            progress=False,
        )
        contender.start_seconds = time.perf_counter() - began
        return contender

    more, every = make.rank * 3 // 2, max(1, steps // 100)
    config = AdaLoraConfig(
        init_r=more,
        target_r=make.rank,
        lora_alpha=make.rank,
        lora_dropout=make.dropout,
        target_modules=make.base.shape.targets,
        tinit=round(0.13 * steps),
        tfinal=round(0.48 * steps),
        deltaT=every,
        total_step=steps,
    )

    def peft_adalora() -> Contender:
        model = get_peft_model(make.copy(), config, autocast_adapter_dtype=False).train()
        return Contender(model, make.batch, model.base_model.update_and_allocate)

    return {
        REFERENCE: lambda: Contender(make.peft(fresh=True), make.batch),
        "PEFT AdaLoRA": peft_adalora,
        "static": lambda: attached(lorank.StaticLoRA(), make.rank),
        "BalancedLoRA": lambda: attached(lorank.BalancedLoRA(), make.rank),
        "SoRA": lambda: attached(lorank.SoRA(budget=make.rank), more),
        "ALoRA exact": lambda: attached(lorank.ALoRA(scores="exact"), make.rank),
        "ALoRA": lambda: attached(lorank.ALoRA(unit="epochs"), make.rank),
        "AdaLoRA": lambda: attached(lorank.AdaLoRA(delta_t=every, budget=make.rank), more),
    }


def train(make: Maker, steps: int, chosen: Sequence[str] | None = None) -> dict[str, Result]:
    makers = runs(make, steps)
    if unknown := set(chosen or ()) - set(makers):
        raise SystemExit(f"unknown runs: {', '.join(sorted(unknown))}; there are {', '.join(makers)}")
    contenders = {name: made() for name, made in makers.items() if not chosen or name in (REFERENCE, *chosen)}
    data, device = batches(make, 16), make.base.device
    results = {name: Result(start=contender.start_seconds) for name, contender in contenders.items()}
    names = list(contenders)
    for step in range(steps):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            contender, result = contenders[name], results[name]
            contender.batch = data[step % len(data)]
            before = _allocations(contender)
            took = seconds_of(contender, device)
            if step:  # the first step also makes the optimiser's state
                (result.allocating if _allocations(contender) > before else result.plain).append(took)
            if step == 1:
                result.peak = peak_mib(_forward_and_back(contender), device)
    return results


def _allocations(contender: Contender) -> int:
    return 0 if contender.ranks is None else len(contender.ranks.history.allocations)


def _forward_and_back(contender: Contender) -> Callable[[], None]:
    """Forward and backward without the optimiser's step: weights and moments do not change."""

    def run() -> None:
        contender.model(**contender.batch).loss.backward()
        contender.optimizer.zero_grad()
        if contender.ranks is not None and contender.ranks.layers.gates is not None:
            contender.ranks.layers.gates.clear_grad()

    return run


def table(results: dict[str, Result]) -> list[str]:
    lines = [
        "| run | seconds | / PEFT LoRA | step, ms | / PEFT LoRA | rounds | each, in its steps "
        "| start and rounds, of the run "
        "| peak of a step, MiB |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    reference = results[REFERENCE]
    for name, one in results.items():
        rounds = ["", ""] if one.round is None else [str(len(one.allocating)), f"{one.round / one.step:.1f}"]
        lines.append(
            f"| {name} | {one.total:.0f} | {one.total / reference.total:.3f} | {1000 * one.step:.1f} "
            f"| {one.step / reference.step:.3f} | {' | '.join(rounds)} | {100 * one.method:.1f} % | {one.peak:.1f} |"
        )
    for name, one in results.items():
        if name.startswith("ALoRA") and one.round is not None and one.step < reference.step:
            price = one.round * len(one.allocating)
            saving = reference.step - one.step
            lines.append(
                f"\n{name}: its rounds cost {price:.1f} s in total and a step saves {1000 * saving:.1f} ms, so it "
                f"takes as long as PEFT's LoRA after {price / saving:.0f} steps."
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", choices=["carried", *SHAPES], default="carried", help="carried: the tiny Llama")
    parser.add_argument("--steps", type=int, default=1000, help="steps of every run, at least 20")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--runs", help=f"comma-separated names of runs beside {REFERENCE}; default: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lorank").setLevel(logging.WARNING)
    dtype = torch.float32 if options.device.type == "cpu" else torch.bfloat16
    shape = PACKAGED if options.model == "carried" else SHAPES[options.model]
    make = Maker(Base(shape, options.device, dtype), options.dropout, rank=options.rank)
    print(
        f"{options.device}, {options.threads} thread(s), {options.model}, {options.steps} steps of {shape.rows} × "
        f"{shape.tokens} tokens, rank {options.rank}, dropout {options.dropout:g}\n"
    )
    results = train(make, options.steps, options.runs.split(",") if options.runs else None)
    print("\n".join(table(results)), flush=True)
    return results


if __name__ == "__main__":
    main()
