"""How costs grow with the model, its ranks and its sequences, and the savings of the exact engine:
python -m benchmarks.growth [--help]

First table: a Llama, and one of its sizes grows at a time. All linear maps except the head are adapted, and every
position has a label.

    step          one training step (forward, backward, AdamW) with lorank's static LoRA, ms; and over PEFT's LoRA
    exact         one round of ALoRA's exact scores on the same batch, in training steps; first order: by gradients
    reallocation  every module loses its worst rank and gets a new rank, with AdamW's moments, in training steps

Second table: the time of each method's hooks before and after the optimiser's step, alone, with gradients and without
an allocation, for few adapted maps and for many.

Third table: the same scores by the exact engine and by 2R + 1 plain forward passes of PEFT's model. Labels are on the
last eighth of every row, or on every position; the vocabulary is small or of a usual size. The last column compares
plain passes with the exact engine in a run, where layers are fused. Operations: the ratio of floating-point operations,
which other programs cannot disturb.

Each row of the first and third table is measured in turns, in one process. Ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import lorank  # noqa: E402
from benchmarks.contenders import LONG, Base, Contender, Maker  # noqa: E402
from benchmarks.measuring import Seconds, interleaved, ratio, seconds_of  # noqa: E402
from benchmarks.shapes import LLAMA_MAPS, VOCABULARY, Shape, llama  # noqa: E402
from lorank.lora import LayerPlan, resize_  # noqa: E402
from lorank.scoring import ablation_scores, first_order_scores  # noqa: E402


@dataclass(frozen=True)
class Size:
    """The sizes that grow.

    Args:
        layers: number of blocks, each with 7 adapted maps.
        rank: rank of every adapted map.
        width: width of the model, a multiple of 64.
        tokens: tokens per row.
        rows: rows of the batch.
        vocabulary: size of the vocabulary.
    """

    layers: int = 4
    rank: int = 4
    width: int = 256
    tokens: int = 64
    rows: int = 8
    vocabulary: int = VOCABULARY

    def maker(self, device: torch.device) -> Maker:
        shape = Shape(
            lambda: llama(self.width, self.layers, vocabulary=self.vocabulary), LLAMA_MAPS, self.rows, self.tokens
        )
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Maker(Base(shape, device, dtype), 0.0, rank=self.rank)


ENGINES: dict[str, Literal["exact", "reference"]] = {"exact": "exact", "reference": "reference", "run": "exact"}
TABLES = ["growth", "hooks", "engine"]
AXES: dict[str, list[int]] = {
    "layers": [2, 4, 8],
    "rank": [2, 4, 8],
    "width": [128, 256, 512],
    "tokens": [32, 64, 128],
}


def reallocation(contender: Contender) -> Callable[[], None]:
    """A function that removes the first rank of every module and adds a new rank."""
    assert contender.ranks is not None
    layers = contender.ranks.layers

    def run() -> None:
        plan = {name: LayerPlan(tuple(range(1, layer.rank)), 1) for name, layer in layers.items()}
        resize_(layers, plan, contender.optimizer)

    return run


def grown(size: Size, turns: int, device: torch.device) -> tuple[Seconds, Contender]:
    make = size.maker(device)
    static = make.attached(lorank.StaticLoRA())
    layers = lorank.find_layers(static.model)
    runs: dict[str, Callable[[], object]] = {
        "PEFT": Contender(make.peft(), make.batch),
        "step": static,
        "exact": lambda: ablation_scores(static.model, layers, make.batch),
        "first order": lambda: first_order_scores(static.model, layers, make.batch),
        "reallocation": reallocation(static),
    }
    return interleaved(runs, turns, device), static


def growth_table(axes: dict[str, list[int]], start: Size, turns: int, device: torch.device) -> dict[Size, Seconds]:
    print("| grows | maps | R | step, ms | / PEFT LoRA | exact | per evaluation | first order | reallocation |")
    print("|---|---|---|---|---|---|---|---|---|")
    found: dict[Size, Seconds] = {}
    for axis, values in axes.items():
        for value in values:
            size = replace(start, **{axis: value})
            if size not in found:
                found[size], static = grown(size, turns, device)
            seconds = found[size]
            assert static.ranks is not None
            maps = 7 * size.layers
            total = maps * size.rank
            exact = ratio(seconds, "exact", "step")
            print(
                f"| {axis} = {value} | {maps} | {total} | {1000 * statistics.median(seconds['step']):.0f} "
                f"| {ratio(seconds, 'step', 'PEFT'):.3f} | {exact:.1f} | {exact / (2 * total + 1):.3f} "
                f"| {ratio(seconds, 'first order', 'step'):.2f} | {ratio(seconds, 'reallocation', 'step'):.3f} |",
                flush=True,
            )
    return found


def bookkeeping_table(sizes: Sequence[Size], turns: int, device: torch.device) -> dict[tuple[Size, str], float]:
    """Milliseconds of each method's hooks in one step."""
    names = {
        "static": lambda make: make.attached(lorank.StaticLoRA()),
        "ALoRA": lambda make: make.attached(lorank.ALoRA(unit="epochs")),
        "ARD-LoRA": lambda make: make.ard(),
        "AdaLoRA": lambda make: make.attached(lorank.AdaLoRA(t_init=0, t_final=1, delta_t=LONG)),
        "SoRA": lambda make: make.attached(lorank.SoRA()),
    }
    print(f"\n| maps | a step, ms | {' | '.join(names)} |\n|---|---|" + "---|" * len(names))
    found: dict[tuple[Size, str], float] = {}
    for size in sizes:
        make, step = size.maker(device), 0.0
        for name, attach in names.items():
            contender = attach(make)
            step = step or statistics.median(seconds_of(contender, device) for _ in range(3))
            contender.model(**contender.batch).loss.backward()
            hooks = _hooks(contender)
            hooks()
            found[size, name] = 1000 * statistics.median(seconds_of(hooks, device) for _ in range(10 * turns))
        cells = (f"{found[size, name]:.2f}" for name in names)
        print(f"| {7 * size.layers} | {1000 * step:.0f} | {' | '.join(cells)} |", flush=True)
    return found


def _hooks(contender: Contender) -> Callable[[], None]:
    """The hooks that a run registers on its optimiser's step."""
    optimizer = contender.optimizer
    optimizer.step()  # lorank checks after the first step that the optimiser has made its state
    before, after = optimizer._optimizer_step_pre_hooks.values(), optimizer._optimizer_step_post_hooks.values()

    def run() -> None:
        for hook in (*before, *after):
            hook(optimizer, (), {})

    return run


def engine_table(sizes: Sequence[Size], turns: int, device: torch.device) -> dict[tuple[Size, str], float]:
    """The time of plain forward passes divided by the time of the exact engine, for the same scores."""
    print("\n| model | labelled positions | operations | naive / exact | exact, s | naive, s | at least | | in a run |")
    print("|---" * 9 + "|")
    found: dict[tuple[Size, str], float] = {}
    for size in sizes:
        make = size.maker(device)
        static = make.attached(lorank.StaticLoRA())
        models = {"exact": make.peft(), "reference": make.peft(), "run": static.model}
        title = f"{size.layers} × {size.width}, R = {7 * size.layers * size.rank}, {size.vocabulary:,} words"
        for what, bound in (("an eighth", 3.0), ("all", 1.8)):
            batch = dict(make.batch)
            if what == "an eighth":
                labels = batch["labels"].clone()
                labels[:, : -(size.tokens // 8)] = -100
                batch["labels"] = labels

            runs = {
                name: partial(ablation_scores, model, lorank.find_layers(model), batch, engine=ENGINES[name])
                for name, model in models.items()
            }
            seconds = interleaved(runs, turns, device, warm_up=0)
            assert runs["exact"]().engine == "exact"
            less = _operations(runs["reference"]) / _operations(runs["exact"])
            found[size, what] = ratio(seconds, "reference", "exact")
            times = (f"{statistics.median(seconds[engine]):.1f}" for engine in ("exact", "reference"))
            verdict = "met" if found[size, what] >= bound else "missed"
            print(
                f"| {title} | {what} | {less:.2f} | {found[size, what]:.2f} | {' | '.join(times)} "
                f"| {bound:g} | {verdict} | {ratio(seconds, 'reference', 'run'):.2f} |",
                flush=True,
            )
    return found


def _operations(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def main(
    arguments: Sequence[str] | None = None,
) -> tuple[dict[Size, Seconds], dict[tuple[Size, str], float], dict[tuple[Size, str], float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--smallest", action="store_true", help="one tiny model, to check that the benchmark runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lorank").setLevel(logging.ERROR)  # no warning that no rank moves: it is intended here
    print(f"{options.device}, {options.threads} thread(s), {options.turns} turns\n")
    if options.smallest:
        tiny = Size(layers=1, rank=2, width=64, tokens=16, rows=2)
        axes, start, engine, few, many = {"layers": [1]}, tiny, [tiny], tiny, tiny
    else:
        axes, start = AXES, Size()
        engine = [Size(layers=8, rank=2, width=256, vocabulary=words) for words in (VOCABULARY, 32_000)]
        few, many = (Size(layers=layers, rank=8, width=128) for layers in (4, 32))
    found = growth_table(axes, start, options.turns, options.device) if "growth" in options.tables else {}
    hooks: dict[tuple[Size, str], float] = {}
    if "hooks" in options.tables:
        hooks = bookkeeping_table(list(dict.fromkeys((few, many))), options.turns, options.device)
    if "engine" not in options.tables:
        return found, hooks, {}
    return found, hooks, engine_table(engine, max(1, options.turns // 2), options.device)


if __name__ == "__main__":
    main()
