"""Two adapters merged into one of the size of one, by several ways; losses on both tasks:

    lorank train manual.yaml && lorank train e2e.yaml      # docs/merging.md has the two recipes
    python -m benchmarks.merging runs/manual runs/e2e

The mixture of both tasks is the mean of the two losses, on validation examples that no cut has read.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from lorank.experiments.adapter_session import LoadedAdapter, load_finished
from lorank.experiments.merge import merge
from lorank.tasks import mean_loss

SAMPLES = 32


def losses(tasks: Sequence[LoadedAdapter], model: Any) -> list[float]:
    return [
        mean_loss(model, one.held_apart(SAMPLES), one.task.collator, batch_size=one.batch_size, progress=False)
        for one in tasks
    ]


def by_peft(runs: Sequence[Path], base: Any, weights: list[float], how: str, rank: int | None) -> Any:
    model: Any = PeftModel.from_pretrained(base, runs[0] / "adapter", adapter_name="a")
    model.load_adapter(runs[1] / "adapter", adapter_name="b")
    options = {} if rank is None else {"svd_rank": rank}
    model.add_weighted_adapter(["a", "b"], weights, "both", combination_type=how, **options)
    model.set_adapter("both")
    return model.eval()


def numbers(model: Any, adapter: str) -> int:
    own = (f"lora_A.{adapter}.", f"lora_B.{adapter}.")
    return sum(value.numel() for name, value in model.named_parameters() if any(part in name for part in own))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path)
    parser.add_argument("--rank", type=int, default=8, help="the result is as large as with this rank everywhere")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    tasks = [load_finished(run) for run in arguments.runs]

    def base() -> Any:
        from transformers import AutoModelForCausalLM

        from lorank.experiments.models import resolve

        return AutoModelForCausalLM.from_pretrained(resolve(tasks[0].config.model.name))

    def show(what: str, size: int, model: Any) -> None:
        found = losses(tasks, model)
        print(f"| {what} | {size:,} | {found[0]:.3f} | {found[1]:.3f} | {sum(found) / 2:.3f} |", flush=True)

    print(f"| | numbers | {arguments.runs[0].name} | {arguments.runs[1].name} | both |\n|---|---|---|---|---|")
    show("base model", 0, base().eval())
    for run, one in zip(arguments.runs, tasks, strict=True):
        show(f"the adapter of {run.name} alone", one.layers.parameters, one.model)
    with tempfile.TemporaryDirectory() as temporary:
        for weights in ([0.5, 0.5], [1.0, 1.0]):
            given = f"{weights[0]:g}, {weights[1]:g}"
            whole = by_peft(arguments.runs, base(), weights, "cat", None)
            show(f"{given}: PEFT's cat", numbers(whole, "both"), whole)
            small = by_peft(arguments.runs, base(), weights, "svd", arguments.rank)
            size = numbers(small, "both")
            show(f"{given}: PEFT's svd, svd_rank={arguments.rank}", size, small)
            for by in ("svd", "balanced"):
                out = Path(temporary) / f"{by}{given}"
                merged = merge(
                    arguments.runs, out, weights=weights, budget=f"{size / 1e6:.6f}M", by=by, samples=SAMPLES
                )
                show(f"{given}: lorank merge --by {by}", merged.parameters[1], tasks[0].reload(out).model)


if __name__ == "__main__":
    main()
