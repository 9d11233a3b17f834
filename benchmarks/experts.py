"""A small mixture of experts, adapted with static and with moving ranks:  python -m benchmarks.experts OUT [--help]

A Mixtral of two blocks (width 64, eight experts of width 64, two per token, bytes as tokens) is trained on books and
then adapted to school problems in arithmetic, by LoRA on q, k, v, o and on both parameters of the experts. All methods
train about as many parameters as a LoRA of rank 2 in every module (a method that starts wide, at its end), but for
one that has twice as many. Each has its own learning rate, the best of three by seed 0; then come the other seeds. The
loss is that of held-out problems, in nats per byte.

``--differences`` trains a LoRA of rank 8 and asks whether experts should have ranks of their own: how its singular
values differ between the experts of a module, and what it loses when it is cut to a budget with one rank for all
experts of a module, or with a rank for each expert (with the same number of parameters, and the same scores).

Every run is one line of OUT/results.jsonl. The same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from torch import Tensor, nn  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM, set_seed  # noqa: E402

import lorank  # noqa: E402
from lorank.lora import AdapterLayers, find_layers, make_peft_model, resize_  # noqa: E402
from lorank.lora.resize_plan import LayerPlan  # noqa: E402
from lorank.scoring import balanced_scores  # noqa: E402

LENGTH, ROWS, EXPERTS = 64, 16, 8
PRETRAIN_STEPS, PRETRAIN_LR = 400, 4e-3
STEPS, RANK, RATES, SEEDS = 120, 2, (0.01, 0.02, 0.04), (0, 1, 2)
HELD_OUT = 256
"""Blocks of held-out text for the losses."""
SCORED = 64
"""Further held-out blocks on which ranks are scored."""
FULL = "100% of adapter"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A way to adapt the model.

    Args:
        title: its name in the table.
        make: the allocator.
        rank: the rank of every module at the start.
        batches: whether it reads training batches at the start.
        experts: whether the experts are adapted too, or attention alone.
        start: whether ranks and directions are chosen by ``gradient_start_`` before training.
    """

    title: str
    make: Callable[[], lorank.Allocator]
    rank: int = RANK
    batches: bool = False
    experts: bool = True
    start: bool = False


METHODS = {
    "static": Method("LoRA", lorank.StaticLoRA),
    "alora": Method("ALoRA", lambda: lorank.ALoRA(budget=FULL)),
    "balanced": Method("BalancedLoRA", lorank.BalancedLoRA, batches=True),
    "start": Method("LoRA from a gradient start", lorank.StaticLoRA, start=True),
    "attention": Method("LoRA, attention alone", lorank.StaticLoRA, 13, experts=False),
    "double": Method("LoRA, twice the parameters", lorank.StaticLoRA, 2 * RANK),
}


def blocks(text: bytes) -> Tensor:
    """(n, LENGTH) token ids: the bytes of a text."""
    count = len(text) // LENGTH
    return torch.frombuffer(bytearray(text[: count * LENGTH]), dtype=torch.uint8).reshape(count, LENGTH).long()


def books() -> Tensor:
    return blocks(gzip.decompress((_data() / "classics" / "corpus.txt.gz").read_bytes()))


def problems() -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of school problems: for training, for scores, and for losses."""
    lines = gzip.decompress((_data() / "gsm8k" / "train.jsonl.gz").read_bytes()).decode().strip().split("\n")
    texts = [json.loads(line) for line in lines]
    own = blocks("\n\n".join(f"{one['question']}\n{one['answer']}" for one in texts).encode())
    return own[: -HELD_OUT - SCORED], own[-HELD_OUT - SCORED : -HELD_OUT], own[-HELD_OUT:]


def _data() -> Path:
    folder = os.environ.get("LORANK_DATA")
    if folder is None:
        raise SystemExit("set LORANK_DATA to a folder with classics/corpus.txt.gz and gsm8k/train.jsonl.gz")
    return Path(folder)


def batch_of(rows: Tensor) -> Batch:
    return {"input_ids": rows, "labels": rows}


def draws(rows: Tensor, steps: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield batch_of(rows[torch.randint(len(rows), (ROWS,), generator=generator)])


def new_model() -> nn.Module:
    set_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            max_position_embeddings=LENGTH,
            output_router_logits=True,
            tie_word_embeddings=True,
        )
    )


def base_model(out: Path, steps: int) -> nn.Module:
    """The model after training on books; it is trained if it is not in ``out``."""
    folder = out / "base"
    if not (folder / "config.json").is_file():
        model, rows = new_model(), books()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_LR, total_steps=steps)
        began = time.perf_counter()
        for step, batch in enumerate(draws(rows, steps, seed=0)):
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 100 == 0:
                print(
                    f"books, step {step} of {steps}: {float(loss):.3f}, {time.perf_counter() - began:.0f} s", flush=True
                )
        model.save_pretrained(folder)
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.output_router_logits = False  # a fine-tuned router is frozen: no loss for its balance
    return model


def adapted(base: nn.Module, rank: int, experts: bool = True) -> nn.Module:
    return make_peft_model(
        base,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if experts else None,
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def loss_of(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    losses = [float(model(**batch_of(part)).loss) for part in rows.split(ROWS)]
    model.train()
    return statistics.mean(losses)


def train(out: Path, method: Method, lr: float, seed: int, steps: int, pretrain: int) -> dict[str, Any]:
    """One run, as a line of the results."""
    training, scored, held_out = problems()
    base = base_model(out, pretrain)
    set_seed(seed)
    model = adapted(base, method.rank, method.experts).train()
    first = list(draws(training, 4, seed=1000 + seed))
    if method.start:
        lorank.gradient_start_(model, first, seed=seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps), 1.0)
    )
    began = time.perf_counter()
    ranks = lorank.attach(
        model,
        optimizer,
        method.make(),
        validation_batch=batch_of(scored),
        train_batches=first if method.batches else None,
        total_steps=steps,
        seed=seed,
    )
    for batch in draws(training, steps, seed):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    layers = ranks.layers
    return {
        "loss": loss_of(model, held_out),
        "parameters": layers.parameters,
        "ranks": layers.ranks,
        "seconds": round(time.perf_counter() - began, 1),
    }


def all_runs(
    out: Path, methods: list[str], steps: int, pretrain: int, rates: tuple[float, ...], seeds: tuple[int, ...]
) -> list[Any]:
    """Does the runs of ``methods`` that are missing, and returns all that are there."""
    path = out / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def run(name: str, lr: float, seed: int) -> None:
        if any((one["method"], one["lr"], one["seed"]) == (name, lr, seed) for one in done):
            return
        found = {"method": name, "lr": lr, "seed": seed, **train(out, METHODS[name], lr, seed, steps, pretrain)}
        done.append(found)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(name, lr, seed, f"{found['loss']:.4f}", found["parameters"], f"{found['seconds']} s", flush=True)

    for lr in rates:
        for name in methods:
            run(name, lr, seeds[0])
    for seed in seeds[1:]:
        for name in methods:
            run(name, best_rate(done, name, seeds[0]), seed)
    return done


def best_rate(done: list[Any], name: str, seed: int) -> float:
    own = [one for one in done if one["method"] == name and one["seed"] == seed]
    return float(min(own, key=lambda one: one["loss"])["lr"])


def table(done: list[Any], methods: list[str], seeds: tuple[int, ...]) -> str:
    """The loss of every method at its own rate, and its difference to LoRA with the same seed."""
    rows = [
        "| method | learning rate | parameters | ranks in attention / experts | loss | against LoRA |",
        "|---|---|---|---|---|---|",
    ]
    chosen = {name: best_rate(done, name, seeds[0]) for name in methods}
    losses = {
        name: [next(o["loss"] for o in done if (o["method"], o["lr"], o["seed"]) == (name, lr, seed)) for seed in seeds]
        for name, lr in chosen.items()
    }
    for name in methods:
        first = next(o for o in done if (o["method"], o["lr"], o["seed"]) == (name, chosen[name], seeds[0]))
        inside = [sum(r for n, r in first["ranks"].items() if ("experts" in n) is e) for e in (False, True)]
        differences = [a - b for a, b in zip(losses[name], losses.get("static", losses[name]), strict=True)]
        rows.append(
            f"| {METHODS[name].title} | {chosen[name]:g} | {first['parameters']:,} | {inside[0]} / {inside[1]} | "
            f"{_mean(losses[name])} | {'' if name == 'static' else _mean(differences, sign=True)} |"
        )
    return "\n".join(rows)


def _mean(values: list[float], *, sign: bool = False) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{'+' if sign else ''}.4f} ± {error:.4f}"


def differences(out: Path, steps: int, pretrain: int, lr: float) -> str:
    """Whether experts of a module want different ranks, by a LoRA of rank 8."""
    training, scored, held_out = problems()
    set_seed(0)
    model = adapted(base_model(out, pretrain), 8).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step, batch in enumerate(draws(training, steps, 0)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    layers = find_layers(model.eval())
    parts = [batch_of(part) for part in scored.split(8)]
    found = balanced_scores(model, layers, parts)
    with torch.no_grad():
        for name, layer in layers.items():  # turned, so that rank i is the i-th in every expert
            resize_(layers, {name: LayerPlan(tuple(range(layer.rank)), basis=found[name].basis)})
    worths = expert_worths(model, layers, parts)  # σ² of every rank of every expert, (r, E)
    rows = [
        "| module | σ² of an expert, least / median / most | effective rank, least / median / most |",
        "|---|---|---|",
    ]
    for name, own in worths.items():
        total = own.sum(0)  # (E,)
        effective = total.square() / own.square().sum(0).clamp_min(1e-30)
        rows.append(f"| {name} | {_spread(total / total.mean())} of the mean | {_spread(effective)} |")
    rows += ["", f"Loss of the adapter: {loss_of(model, held_out):.4f}", ""]
    rows += ["| size | one rank for all experts of a module | a rank for each expert |", "|---|---|---|"]
    for share in (50, 25, 12.5):
        shared, apart = (cut_loss(model, layers, worths, share, held_out, by_expert=one) for one in (False, True))
        rows.append(f"| {share:g} % | {shared:.4f} | {apart:.4f} |")
    return "\n".join(rows)


def expert_worths(model: nn.Module, layers: AdapterLayers, parts: list[Batch]) -> dict[str, Tensor]:
    """σ² of each expert's own ranks, (r, E), of the layers in their balanced basis."""
    from lorank.scoring.gramians import measure_gramians

    pairs = measure_gramians(model, layers, parts)
    return {
        name: (pairs[name].Z.diagonal(dim1=-2, dim2=-1) * pairs[name].D.diagonal(dim1=-2, dim2=-1)).T
        for name, layer in layers.items()
        if layer.layout.experts > 1
    }


@torch.no_grad()
def cut_loss(
    model: nn.Module,
    layers: AdapterLayers,
    worths: Mapping[str, Tensor],
    share: float,
    rows: Tensor,
    *,
    by_expert: bool,
) -> float:
    """The loss when only the most valuable ranks of the experts' modules stay, by σ² per parameter.

    A rank of one expert that goes has its column of B set to zero.
    """
    scores = {name: (own if by_expert else own.mean(1, keepdim=True).expand_as(own)) for name, own in worths.items()}
    costs = {name: layers[name].rank_parameters / EXPERTS for name in scores}
    flat = [
        (float(values[i, e]) / costs[name], name, i, e)
        for name, values in scores.items()
        for i in range(values.shape[0])
        for e in range(values.shape[1])
    ]
    limit = share / 100 * sum(costs[name] * values.numel() for name, values in scores.items())
    before = {name: layers[name].B.detach().clone() for name in scores}
    kept = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    used = 0.0
    for _, name, i, e in sorted(flat, key=lambda one: (-one[0], one[1:])):
        if used + costs[name] <= limit:
            kept[name][i, e] = True
            used += costs[name]
    for name, mask in kept.items():
        layers[name].B.mul_(mask.flatten())  # column i·E + e
    loss = loss_of(model, rows)
    for name, values in before.items():
        layers[name].B.copy_(values)
    return loss


def _spread(values: Tensor) -> str:
    return " / ".join(f"{float(one):.2f}" for one in (values.min(), values.median(), values.max()))


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for the base model and the results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="[all]")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of every run [%(default)s]")
    parser.add_argument("--pretrain", type=int, default=PRETRAIN_STEPS, help="steps on books [%(default)s]")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds [%(default)s]")
    parser.add_argument("--differences", action="store_true", help="how much the experts of a module differ")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.differences:
        text = differences(given.out, given.steps, given.pretrain, given.rates[0])
    else:
        seeds = tuple(given.seeds)
        done = all_runs(given.out, given.methods, given.steps, given.pretrain, tuple(given.rates), seeds)
        text = table(done, given.methods, seeds)
    print(text)
    return text


if __name__ == "__main__":
    main()
