"""Compares LoRA per head with plain LoRA of equally many parameters: benchmarks/heads.py [repetitions] [model]

It times one training step (forward, backward, AdamW) of a model with random weights and adapted q, k, v and o.
Everything runs in one process, in turns: each repetition steps every form once, and a ratio is the median over the
repetitions of the quotient with PEFT's LoRA in the same repetition. The forms that compute the same heads:

- concatenated: lorank's own form, with a learned gate per rank, as in ARD-LoRA
- ARD-LoRA: the same form, with all work of the method in a step
- padded: every head padded to the largest rank of its projection, batched products
- masked: the dense block-structured matrix in a plain LoRA, multiplied by a mask of zeros

``model`` is the beginning of a name in the table. Set OMP_NUM_THREADS to choose the number of threads.
"""

from __future__ import annotations

import copy
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import LoraVariant  # noqa: E402
from shapes import VOCABULARY, bert, llama  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lorank  # noqa: E402
from lorank.lora import plan_for_heads, rank_origins, resize_, split_into_heads_  # noqa: E402
from lorank.lora.attention_heads import head_groups  # noqa: E402
from lorank.lora.kernels.per_head import HeadGroups, blocks, dense_A, dense_B  # noqa: E402

# name → (model, adapted modules, (rows, tokens) of the batch)
SHAPES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "BERT 6 × 384": (
        lambda: bert(384, 6),
        r".*attention\.(self\.(query|key|value)|output\.dense)",
        (8, 64),
    ),
    "Llama 8 × 512": (lambda: llama(512, 8, heads_per_key=2), r".*self_attn\.[qkvo]_proj", (4, 96)),
    "Llama 6 × 1024": (lambda: llama(1024, 6, heads_per_key=2), r".*self_attn\.[qkvo]_proj", (2, 128)),
}


def head_ranks(groups: HeadGroups, mean: int, skewed: bool) -> list[int]:
    """The ranks of all heads: equal, or (skewed) falling from 3 × the mean to 0 with the same total."""
    if not skewed:
        return [mean] * groups.count
    weights = [groups.count - head for head in range(groups.count)]
    weights = [weight**2 for weight in weights]
    total = mean * groups.count
    ranks = [weight * total // sum(weights) for weight in weights]
    for head in range(total - sum(ranks)):
        ranks[head % groups.count] += 1
    return ranks


class Form(LoraVariant):
    """A form that computes the heads of one layer; it replaces PEFT's forward pass and parameters."""

    def __init__(self, layer: Any, groups: HeadGroups, ranks: list[int]) -> None:
        self.groups, self.ranks, self.scaling = groups, ranks, layer.scaling
        self.R = sum(ranks)
        self.d_in, self.d_out = layer.d_in, layer.d_out
        self.rows = groups.kind == "rows"
        A = torch.randn(self.R, self.d_in if self.rows else groups.size) * 0.02
        B = torch.randn(groups.size if self.rows else self.d_out, self.R) * 0.02
        A, B = self.arrange(A, B)
        layer.module.lora_A["default"].weight = nn.Parameter(A)
        layer.module.lora_B["default"].weight = nn.Parameter(B)
        layer.module.lora_variant["default"] = self

    def arrange(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A, B

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        return self.update(result, x, A, B)

    def update(self, result: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        raise NotImplementedError


class Padded(Form):
    def arrange(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        heads, size, most = self.groups.count, self.groups.size, max(self.ranks)
        new_A, new_B = A.new_zeros(heads, most, A.shape[1]), B.new_zeros(heads, B.shape[0], most)
        for own, rank in blocks(self.groups, self.ranks):
            head, count = own.start // size, rank.stop - rank.start
            new_A[head, :count], new_B[head, :, :count] = A[rank], B[:, rank]
        return new_A, new_B

    def update(self, result: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        n = x.shape[:-1].numel()
        heads, size, most = self.groups.count, self.groups.size, A.shape[1]
        if self.rows:
            z = x.reshape(n, -1) @ A.reshape(heads * most, -1).T  # (n, H·r)
            u = torch.bmm(z.view(n, heads, most).transpose(0, 1), B.transpose(1, 2))  # (H, n, d_h)
            update = u.transpose(0, 1).reshape(result.shape)
        else:
            z = torch.bmm(x.reshape(n, heads, size).transpose(0, 1), A.transpose(1, 2))  # (H, n, r)
            update = z.transpose(0, 1).reshape(n, -1) @ B.transpose(0, 1).reshape(self.d_out, -1).T  # (n, d_out)
        return result + update.reshape(result.shape) * self.scaling


class Masked(Form):
    def arrange(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        ones = (
            dense_A(torch.ones_like(A), self.groups, self.ranks),
            dense_B(torch.ones_like(B), self.groups, self.ranks),
        )
        self.mask = ones[1] if self.rows else ones[0]
        return dense_A(A, self.groups, self.ranks), dense_B(B, self.groups, self.ranks)

    def update(self, result: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if self.rows:
            B = B * self.mask
        else:
            A = A * self.mask
        return result + nn.functional.linear(nn.functional.linear(x, A), B) * self.scaling


FORMS: dict[str, type[Form]] = {"padded": Padded, "masked": Masked}
OURS = ("concatenated", "ARD-LoRA")


class Trained:
    """A model with its optimiser; a call takes one step and returns its seconds."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], after: Callable[[], None] = lambda: None) -> None:
        self.model, self.batch, self.after = model, batch, after
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def __call__(self) -> float:
        began = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after()
        return time.perf_counter() - began


def _plan(layers: Any, mean: int, skewed: bool) -> Any:
    return {
        name: plan_for_heads(layer.head_ranks, head_ranks(layer.groups, mean, skewed)) for name, layer in layers.items()
    }


def contenders(shape: str, mean: int, skewed: bool) -> dict[str, Trained]:
    make, targets, size = SHAPES[shape]
    torch.manual_seed(0)
    base = make()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(3, VOCABULARY, size)
    batch = {"input_ids": ids, "labels": ids}
    shared = {id(parameter): parameter for parameter in base.parameters()}

    def adapted(**lora: Any) -> nn.Module:
        settings = {"init_lora_weights": False, **lora}
        config = LoraConfig(lora_alpha=8, target_modules=targets, **settings)
        return get_peft_model(copy.deepcopy(base, dict(shared)), config)

    plain = {}
    made: dict[str, Trained] = {}
    for name in OURS:
        model = adapted(r=1, init_lora_weights=True)
        layers = lorank.find_layers(model)
        if name == "ARD-LoRA":
            trained = Trained(model, batch)
            ard = lorank.ARDLoRA(r0=1, resize_every=10**6)
            ranks = lorank.attach(model, trained.optimizer, ard, total_steps=10**6)
            layers, made[name] = ranks.layers, trained
            plan = _plan(layers, mean, skewed)
            before = layers.ranks
            resize_(layers, plan, trained.optimizer)
            ard.after_resize(ranks._context(), ranks.state, rank_origins(plan, before))
            trained.parameters = layers.parameters
            continue
        split_into_heads_(layers, head_groups(layers))
        resize_(layers, _plan(layers, mean, skewed))
        gates = layers.learn_gates()
        made[name] = Trained(model, batch, gates.clear_grad)
    for name, form in FORMS.items():
        model = adapted(r=4)
        layers = lorank.find_layers(model)
        groups = head_groups(layers)
        assert len(groups) == len(layers), "every adapted projection has heads"
        for layer_name, layer in layers.items():
            ranks = head_ranks(groups[layer_name], mean, skewed)
            parameters = sum(ranks) * ((layer.d_in if groups[layer_name].kind == "rows" else layer.d_out) + 64)
            plain[f"^{layer_name}$"] = max(1, round(parameters / (layer.d_in + layer.d_out)))
            form(layer, groups[layer_name], ranks)
        made[name] = Trained(model, batch)
    return {"PEFT": Trained(adapted(r=4, rank_pattern=plain), batch), **made}


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print(
        f"{torch.get_num_threads()} thread(s), {repetitions} repetitions; time of a step, divided by the time of "
        "PEFT's LoRA with equally many parameters"
    )
    print(f"| model | mean rank per head | {' | '.join([*OURS, *FORMS])} | PEFT, ms | parameters, heads / PEFT |")
    print("|---|---|" + "---|" * (len(FORMS) + len(OURS) + 2))
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    logging.getLogger("lorank").setLevel(logging.ERROR)  # no warning that no rank moves: it is intended here
    for shape in (name for name in SHAPES if name.startswith(wanted)):
        for mean, skewed in ((2, False), (2, True), (8, False), (8, True)):
            runs = contenders(shape, mean, skewed)
            for run in runs.values():
                run()  # a warm-up that also makes the optimiser's state
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repetitions):
                for name, run in runs.items():
                    seconds[name].append(run())
            ratios = [
                statistics.median(ours / peft for ours, peft in zip(seconds[name], seconds["PEFT"], strict=True))
                for name in (*OURS, *FORMS)
            ]
            print(
                f"| {shape} | {mean}{', skewed' if skewed else ''} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} "
                f"| {1000 * statistics.median(seconds['PEFT']):.0f} "
                f"| {runs['concatenated'].parameters / runs['PEFT'].parameters:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
