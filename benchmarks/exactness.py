"""Measures how exact lorank is, and prints the table of docs/exactness.md:  python benchmarks/exactness.py

Each line gives the largest relative deviation found: of a whole tensor, ‖actual − expected‖ / ‖expected‖, and of its
worst entry, max|actual − expected| / max|expected|. The bound applies to the whole tensor. The models are small and
random, the seeds are fixed; it takes a minute on one core.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

import lorank  # noqa: E402  # after the warnings of the libraries that it imports
from lorank.lora import LayerPlan, resize_, save_adapter  # noqa: E402
from lorank.scoring import ablation_scores  # noqa: E402
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch  # noqa: E402

MODELS: dict[str, tuple[Callable[[], nn.Module], dict, Callable[..., dict[str, Tensor]]]] = {
    "Llama, GQA": (tiny_llama, {}, token_batch),
    "BERT classifier": (tiny_bert, {"task_type": "SEQ_CLS"}, class_batch),
    "GPT-2, Conv1D": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        token_batch,
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW, for-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


Deviation = tuple[float, float]
"""Relative deviation of the whole tensor, and of its worst entry."""
Lines = Iterator[tuple[str, Deviation, float]]


def relative(actual: Tensor, expected: Tensor) -> Deviation:
    gap, expected = (actual - expected).double(), expected.double()
    return float(gap.norm() / expected.norm()), float(gap.abs().max() / expected.abs().max())


def worse(one: Deviation, other: Deviation) -> Deviation:
    return max(one[0], other[0]), max(one[1], other[1])


def output_change_of_a_resize() -> Lines:
    """100 random resizes in a row: ranks with gate 0 are pruned, new ranks are added; noise on B replaces training."""
    for name, (make, lora, batch_of) in MODELS.items():
        for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            model = adapted(make(), **lora).to(dtype).eval()
            layers, batch = lorank.find_layers(model), batch_of(padded=True)
            generator = torch.Generator().manual_seed(0)
            worst = (0.0, 0.0)
            for round_ in range(100):
                plan = {layer_name: _random_change(layer.rank, generator) for layer_name, layer in layers.items()}
                for layer_name, layer in layers.items():
                    gate = torch.zeros(layer.rank)
                    gate[list(plan[layer_name].keep)] = 1
                    layer.gate = gate
                with torch.no_grad():
                    expected = model(**batch).logits
                    resize_(layers, plan, seed=round_)
                    for layer in layers.values():
                        layer.gate = None
                    worst = worse(worst, relative(model(**batch).logits, expected))
                    for layer in layers.values():
                        noise = torch.randn(layer.B.shape, generator=generator).to(dtype)
                        layer.B.mul_(0.9).add_(noise, alpha=0.08)  # stays near its initial size of 0.2
            label = str(dtype).removeprefix("torch.")
            yield f"output after a resize, 100 in a row, {name} ({label})", worst, bound


def _random_change(rank: int, generator: torch.Generator) -> LayerPlan:
    keep = (torch.rand(rank, generator=generator) < 0.8).nonzero().flatten().tolist()
    return LayerPlan(tuple(keep), int(torch.randint(0, 3, (), generator=generator)))


def pruned_against_masked() -> Lines:
    """50 steps with ranks removed, compared with the same ranks set to zero before every step; all in float64.

    Training is stable at this learning rate. At 1e-2, AdamW on this random model is chaotic: a rounding difference of
    1e-16 grows a thousandfold every ten steps.
    """
    make_model, lora, batch_of = MODELS["GPT-2, Conv1D"]
    for name, make in OPTIMIZERS.items():
        pruned = adapted(make_model(), **lora).double().eval()  # no dropout: the two models would draw different masks
        masked = copy.deepcopy(pruned)
        optimizers = {model: make(trainable(model)) for model in (pruned, masked)}
        layers, masked_layers = lorank.find_layers(pruned), lorank.find_layers(masked)
        dead = list(layers)[::2]

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> Tensor:
            optimizer.zero_grad()
            ids = batch_of(seed=index)["input_ids"]
            logits = model(input_ids=ids).logits[:, :-1]  # transformers' own loss would round to float32
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            return loss.detach()

        for index in range(5):
            for model, optimizer in optimizers.items():
                step(model, optimizer, index)
        resize_(layers, {layer: LayerPlan((1, 3)) for layer in dead}, optimizers[pruned])
        worst = (0.0, 0.0)
        for index in range(5, 55):
            _zero(masked_layers, dead, [0, 2], optimizers[masked])
            ours, theirs = (step(model, optimizer, index) for model, optimizer in optimizers.items())
            worst = worse(worst, relative(ours, theirs))
        yield f"loss, pruned against masked, 50 steps, {name} (float64)", worst, 1e-6
        worst = (0.0, 0.0)
        for layer_name, layer in layers.items():
            alive = [1, 3] if layer_name in dead else [0, 1, 2, 3]
            other = masked_layers[layer_name]
            worst = worse(worst, relative(layer.A.data, other.A.data[alive]))
            worst = worse(worst, relative(layer.B.data, other.B.data[:, alive]))
        yield f"weights after them, {name} (float64)", worst, 1e-6


@torch.no_grad()
def _zero(layers: lorank.lora.AdapterLayers, names: list[str], ranks: list[int], optimizer) -> None:
    """Sets weights and moments of some ranks to zero."""
    for name in names:
        for parameter, where in ((layers[name].A, (ranks,)), (layers[name].B, (slice(None), ranks))):
            for tensor in (parameter, *optimizer.state[parameter].values()):
                if isinstance(tensor, Tensor) and tensor.dim() == 2:
                    tensor[where] = 0


def scores_of_the_exact_engine() -> Lines:
    for name, (make, lora, batch_of) in MODELS.items():
        for dtype in (torch.float32, torch.float64):
            model = adapted(make(), **lora).to(dtype)
            layers, batch = lorank.find_layers(model), batch_of(rows=8, padded=True)
            exact = ablation_scores(model, layers, batch, engine="exact")
            naive = ablation_scores(model, layers, batch, engine="reference")
            assert exact.engine == "exact", exact.notice
            flat = [torch.cat(list(result.scores.values())) for result in (exact, naive)]
            label = str(dtype).removeprefix("torch.")
            yield f"scores, exact against naive, {name}, padded ({label})", relative(*flat), 1e-5


def saved_and_reloaded() -> Lines:
    from peft import PeftModel

    for name, (make, lora, batch_of) in MODELS.items():
        model = adapted(make(), lora_alpha=7, **lora).eval()
        layers, batch = lorank.find_layers(model), batch_of(padded=True)
        names = list(layers)
        plan = {n: LayerPlan(tuple(range(1 + i % 4)), i % 3) for i, n in enumerate(names)}
        resize_(layers, {**plan, names[1]: LayerPlan(())})
        for layer in layers.values():
            layer.gate = torch.linspace(0.2, 1.5, layer.rank)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            expected = model(**batch).logits
            save_adapter(layers, Path(folder) / "adapter")
            base = make()
            base.load_state_dict(_base_weights(model), strict=False)
            reloaded = PeftModel.from_pretrained(base, Path(folder) / "adapter").eval()
            yield f"logits after save and reload by PEFT, {name}", relative(reloaded(**batch).logits, expected), 1e-6
            merged = reloaded.merge_and_unload()
            yield f"logits after merge_and_unload, {name}", relative(merged(**batch).logits, expected), 1e-6


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    weights = model.base_model.model.state_dict()
    return {key.replace(".base_layer", ""): value for key, value in weights.items() if "lora_" not in key}


def main() -> None:
    torch.set_num_threads(1)
    print("| what | whole tensor | worst entry | bound |\n|---|---|---|---|")
    for part in (output_change_of_a_resize, pruned_against_masked, scores_of_the_exact_engine, saved_and_reloaded):
        for what, measured, bound in part():
            print(f"| {what} | {measured[0]:.1e} | {measured[1]:.1e} | {bound:.0e} |", flush=True)
            if not measured[0] <= bound:
                sys.exit(f"{what}: {measured[0]:.3e} exceeds {bound:.0e}")


if __name__ == "__main__":
    main()
