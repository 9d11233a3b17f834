"""Time and memory of every method for 1, 8 and 70 billion parameters on 1 to 64 GPUs, computed from shapes.

    python -m benchmarks.scaling            prints the tables of docs/scaling.md

Nothing here is measured on a GPU. Every number follows from the shapes of the models, the assumptions in
:class:`Machine` and :class:`Workload`, and ratios that were measured on a CPU (:data:`STEP`). docs/scaling.md says
which, and names the runs that would test them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Model:
    """A Llama.

    Args:
        layers: number of layers.
        width: of the hidden states.
        kv: width of keys and of values.
        inner: width of the MLP.
        vocabulary: number of tokens.
        tied: whether the head is the embedding.
    """

    layers: int
    width: int
    kv: int
    inner: int
    vocabulary: int
    tied: bool = False

    @property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """(d_in, d_out) of the seven maps of a layer."""
        d, kv, inner = self.width, self.kv, self.inner
        return ((d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d))

    @property
    def in_maps(self) -> int:
        """Parameters of all maps that are adapted."""
        return self.layers * sum(a * b for a, b in self.maps)

    @property
    def head(self) -> int:
        return self.width * self.vocabulary

    @property
    def parameters(self) -> int:
        """All parameters: maps, norms, embedding and head."""
        norms = self.width * (2 * self.layers + 1)
        return self.in_maps + norms + self.head * (1 if self.tied else 2)

    def adapter(self, rank: float) -> int:
        """Numbers in A and B with the rank in every map."""
        return round(self.layers * rank * sum(a + b for a, b in self.maps))


MODELS = {
    "Llama 3.2 1B": Model(16, 2048, 512, 8192, 128_256, tied=True),
    "Llama 3.1 8B": Model(32, 4096, 1024, 14_336, 128_256),
    "Llama 3.1 70B": Model(80, 8192, 1024, 28_672, 128_256),
}
LLAMA_2_7B = Model(32, 4096, 4096, 11_008, 32_000)


@dataclass(frozen=True)
class Machine:
    """A GPU and its network.

    Args:
        memory: bytes.
        flops: operations per second that a training step reaches: 40 % of the 989 TFLOP/s of an H100 in bf16.
        link: bytes per second and GPU within a machine of eight (NVLink).
        network: bytes per second and GPU between machines (400 Gb/s each).
    """

    memory: float = 80 * GB
    flops: float = 0.4 * 989e12
    link: float = 450 * GB
    network: float = 50 * GB


@dataclass(frozen=True)
class Workload:
    """Rows on each GPU: 8 of 512 tokens, every layer checkpointed, so that it is computed twice."""

    rows: int = 8
    length: int = 512

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Method:
    """What a method costs.

    Args:
        widest: the most trained numbers, in budgets.
        step: time of a step, as a multiple of that of lorank's LoRA of the same size (measured on CPUs).
        samples: rows, per round, that scoring runs through the model forward and backward without weight gradients.
        rounds: number of rounds.
        variants: rows per rank and round that scoring runs forward.
        start: training batches that the start runs, with gradients of every weight.
    """

    widest: float = 1.0
    step: float = 1.0
    samples: int = 0
    rounds: int = 0
    variants: int = 0
    start: int = 0


STEP = {"PEFT LoRA": 1.05, "DoRA": 1.06, "ARD-LoRA": 1.01, "AdaLoRA": 1.01, "SoRA": 1.0, "BalancedLoRA": 1.01}
"""docs/performance.md: shape L, without dropout, without oneDNN; Gramians: benchmarks.step."""
METHODS: Mapping[str, Method] = {
    "LoRA": Method(),
    "PEFT LoRA": Method(step=STEP["PEFT LoRA"]),
    "DoRA": Method(step=STEP["DoRA"]),
    "AdaLoRA": Method(widest=1.5, step=STEP["AdaLoRA"]),
    "SoRA": Method(widest=2.0, step=STEP["SoRA"]),
    "ALoRA": Method(samples=2 * 128, rounds=8),
    "ALoRA, exact scores": Method(rounds=8, variants=2 * 32),
    "ARD-LoRA": Method(step=STEP["ARD-LoRA"]),
    "BalancedLoRA": Method(widest=4.0, step=STEP["BalancedLoRA"], start=4),
}
RANK, STEPS = 8, 1000
TRAINED = 16
"""Bytes per trained number: float32 weight and gradient, AdamW's two moments."""
FULL = 16
"""Bytes per parameter in full fine-tuning: bf16 weight and gradient, float32 weight and AdamW's two moments."""
LOGITS = 12
"""Bytes per logit: bf16, its float32 copy, and the gradients of both."""


def activations(model: Model, work: Workload) -> float:
    """Bytes of a step's activations: the input of every layer, one layer computed again, and the logits."""
    kept = 2 * model.layers * model.width
    # in bf16: two norms, q, attention, its output and the MLP's input (width each); k, v; gate, up and their product
    layer = 2 * (6 * model.width + 2 * model.kv + 3 * model.inner)
    return work.tokens * (kept + layer + LOGITS * model.vocabulary)


def memory(model: Model, trained: float, gpus: int, work: Workload, *, base: float = 2.0, full: bool = False) -> float:
    """Bytes on each GPU, with everything but activations divided among the GPUs (FSDP2).

    Args:
        model: the model.
        trained: numbers in the adapter at its widest.
        gpus: number of GPUs.
        work: rows on each.
        base: bytes per frozen weight: 2 in bf16; 0.52 in nf4 with double quantisation.
        full: full fine-tuning.
    """
    held = FULL * model.parameters if full else base * model.parameters + TRAINED * trained
    gathered = 2 * base * sum(a * b for a, b in model.maps) if gpus > 1 else 0  # this layer and the next one
    return held / gpus + gathered + activations(model, work)


def seconds(
    model: Model, trained: float, gpus: int, work: Workload, machine: Machine, *, base: float = 2.0, full: bool = False
) -> float:
    """Seconds of a step: computing, or moving weights (FSDP2), whichever takes longer.

    A product with a weight takes two operations per token: forward, again (checkpointing), for the gradient of its
    input, and in full fine-tuning for its own gradient. A and B take all four.
    """
    passes = 4 if full else 3
    attention = 2 * 2 * work.length * model.width * model.layers * passes / 2  # causal: half of the pairs
    operations = work.tokens * (
        2 * passes * model.in_maps + 2 * (passes - 1) * model.head + attention + 2 * 4 * (0 if full else trained)
    )
    bandwidth = machine.link if gpus <= 8 else machine.network
    moved = base * model.in_maps * (4 if full else 3) * (1 - 1 / gpus)  # gathered three times; gradients scattered once
    return max(operations / machine.flops, moved / bandwidth)


def share_of_run(model: Model, method: Method, work: Workload) -> float:
    """Scoring and start of a run on one GPU, as a fraction of the time of its steps.

    Forward passes take a third of a step's operations; forward and backward without checkpointing two thirds; with
    gradients of every weight, all of them.
    """
    ranks = 7 * model.layers * RANK
    scoring = method.rounds * (method.samples * 2 / 3 + method.variants * ranks / 3) / work.rows
    return (scoring + method.start) / (STEPS * method.step)


def fits(model: Model, trained: float, work: Workload, machine: Machine, base: float, *, full: bool = False) -> str:
    """The smallest number of GPUs that hold the run."""
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        if memory(model, trained, gpus, work, base=base, full=full) < 0.95 * machine.memory:
            return str(gpus)
    return "> 64"


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def methods_table(machine: Machine, work: Workload) -> str:
    """Every method on one GPU, per model that fits."""
    rows = [["model", "method", "trained at most", "GB", "seconds per step", "scoring and start, of the steps"]]
    for name in ("Llama 3.2 1B", "Llama 3.1 8B"):
        model = MODELS[name]
        for title, method in METHODS.items():
            trained = method.widest * model.adapter(RANK)
            step = seconds(model, model.adapter(RANK), 1, work, machine) * method.step
            share = share_of_run(model, method, work)
            size = f"{memory(model, trained, 1, work) / GB:.1f}"
            rows.append([name, title, f"{trained / 1e6:.1f} M", size, f"{step:.3f}", f"{100 * share:.1f} %"])
        full = memory(model, 0, 1, work, full=True)
        fit = "" if full < machine.memory else ", does not fit"
        step = seconds(model, 0, 1, work, machine, full=True)
        total = f"{model.parameters / 1e6:,.0f} M"
        rows.append([name, "full fine-tuning", total, f"{full / GB:.1f}{fit}", f"{step:.3f}", ""])
    return table(rows)


def gpus_table(machine: Machine, work: Workload) -> str:
    """Memory and time per GPU from 1 to 64 GPUs."""
    counts = (1, 8, 64)
    rows = [
        ["model", "base", "method", "GPUs needed", *(f"GB on {n}" for n in counts), *(f"s/step on {n}" for n in counts)]
    ]
    for name, model in MODELS.items():
        for base, size in (("bf16", 2.0), ("nf4", 0.52)):
            for title, widest in (("LoRA", 1.0), ("SoRA", 2.0), ("BalancedLoRA", 4.0)):
                trained = widest * model.adapter(RANK)
                rows.append(
                    [name, base, title, fits(model, trained, work, machine, size)]
                    + [f"{memory(model, trained, n, work, base=size) / GB:.1f}" for n in counts]
                    + [f"{seconds(model, model.adapter(RANK), n, work, machine, base=size):.3f}" for n in counts]
                )
        rows.append(
            [name, "bf16", "full fine-tuning", fits(model, 0, work, machine, 2.0, full=True)]
            + [f"{memory(model, 0, n, work, full=True) / GB:.1f}" for n in counts]
            + [f"{seconds(model, 0, n, work, machine, full=True):.3f}" for n in counts]
        )
    return table(rows)


def papers_table(machine: Machine) -> str:
    """The papers' figures beside what the same formulas say."""
    seven, work = LLAMA_2_7B, Workload(rows=16, length=128)
    lora, sora = (memory(seven, k * seven.adapter(8), 1, work) / GB for k in (1, 2))
    # E2E's 42,061 training examples, at most ten epochs; a forward pass is a third of a step with checkpointing
    rows = 42_061 * 10
    exact = 8 * 2 * 32 * 7 * seven.layers * 8 / 3 / rows
    first = 8 * 2 * 128 * 2 / 3 / rows
    eight = MODELS["Llama 3.1 8B"]
    ard = 100 * (METHODS["ARD-LoRA"].step - 1)
    adapter = TRAINED * eight.adapter(8)
    return table(
        [
            ["figure", "paper", "computed"],
            ["ALoRA paper, E2E, LLaMA-2 7B: memory of LoRA", "17.6 GB", f"{lora:.1f} GB"],
            ["… of SoRA, from twice the ranks", "18.8 GB (+1.2)", f"{sora:.1f} GB (+{sora - lora:.1f})"],
            ["… of ALoRA", "18.1 GB (+0.5)", f"{lora:.1f} GB (+0.0)"],
            [
                "… time that ALoRA's scoring adds",
                "42 %",
                f"{100 * exact:.0f} % a pass per variant, {100 * first:.1f} % first order",
            ],
            ["ARD-LoRA: overhead of a step", "6 %", f"{ard:.0f} % (measured on CPUs)"],
            [
                "ARD-LoRA: memory for adaptation saved",
                "41 %",
                f"41 % of {adapter / GB:.2f} GB is {0.41 * adapter / GB:.2f} GB (8B, rank 8)",
            ],
        ]
    )


def main() -> None:
    machine, work = Machine(), Workload()
    for title, text in (
        ("one GPU", methods_table(machine, work)),
        ("1 to 64 GPUs", gpus_table(machine, work)),
        ("the papers", papers_table(machine)),
    ):
        print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    main()
