"""Times one training step and counts what it saves for the backward pass:  python benchmarks/step.py [--help]

    floor        the frozen model with one trainable bias at its input: the least that any adapter must pay
    LoRA, DoRA   PEFT's own
    fused …      lorank's forward on the same layers, same parameters
    … oneDNN     the same, frozen products by oneDNN too (where it is the faster library: lorank.lora.products)

Models are made from configuration with random weights, every linear map but the head adapted. Everything runs in one
process, interleaved: each repetition steps every contender once, and a ratio is the median over repetitions of the
quotient by the reference in the same repetition. A step is forward, backward, AdamW. Saved bytes are those of all
distinct storages that autograd keeps between forward and backward, parameters left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from peft import LoraConfig, get_peft_model  # noqa: E402
from shapes import VOCABULARY, bert, llama  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lorank  # noqa: E402
from lorank.lora import products  # noqa: E402
from lorank.lora.dropped import Dropout  # noqa: E402
from lorank.lora.fused_layer import FusedLora  # noqa: E402

RANK = 8


BERT_MAPS = r".*layer\.\d+\..*(query|key|value|dense)"
LLAMA_MAPS = r".*layers\..*_proj"
# name → (model, what is adapted, rows × tokens of the batch)
SHAPES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "S": (lambda: bert(384, 6), BERT_MAPS, (16, 128)),
    "M": (lambda: llama(512, 8), LLAMA_MAPS, (8, 128)),
    "L": (lambda: llama(1024, 6), LLAMA_MAPS, (4, 128)),
}


class Contender:
    """A model with its optimiser; one call is one step, and returns its seconds."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], *, onednn: bool = False) -> None:
        self.model, self.batch, self.onednn = model, batch, onednn
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.device = batch["input_ids"].device

    @contextlib.contextmanager
    def faster_products(self) -> Iterator[None]:
        usual = mock.patch.object(products, "onednn_linear", return_value=None)
        with contextlib.nullcontext() if self.onednn else usual:
            yield

    def __call__(self) -> float:
        with self.faster_products():
            self.wait()
            began = time.perf_counter()
            self.model(**self.batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.wait()
            return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def saved_mib(self) -> float:
        """Mebibytes that autograd keeps between forward and backward."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        parameters |= {b.untyped_storage().data_ptr() for b in self.model.buffers()}
        sizes: dict[int, int] = {}
        held: list[Tensor] = []  # so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        with self.faster_products(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**self.batch).loss
        del loss
        return sum(sizes.values()) / 2**20


def add_input_bias(model: nn.Module, width: int) -> None:
    """The floor's only trainable parameter."""
    embedding = model.get_input_embeddings()
    embedding.bias = nn.Parameter(torch.zeros(width, device=embedding.weight.device, dtype=embedding.weight.dtype))
    embedding.register_forward_hook(lambda module, _, output: output + module.bias)


def fuse(model: nn.Module, *, shared: bool, onednn: bool) -> None:
    layers = lorank.find_layers(model)
    dropout = Dropout(shared=shared)
    for layer in layers.values():
        layer.module.lora_variant["default"] = FusedLora(dropout, layer.module.lora_variant.get("default"))
        if onednn:
            products.quicken_(layer.module.get_base_layer())


def contenders(shape: str, dropout: float, device: torch.device, shared: bool) -> dict[str, Contender]:
    make, targets, size = SHAPES[shape]
    torch.manual_seed(0)
    base = make().to(device)
    if device.type != "cpu":
        base = base.to(torch.bfloat16)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(3, VOCABULARY, size, device=device)
    batch = {"input_ids": ids, "labels": ids}
    memo = {id(parameter): parameter for parameter in base.parameters()}

    def adapted(dora: bool, **fused: bool) -> Contender:
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=dropout,
            use_dora=dora,
            target_modules=targets,
            init_lora_weights=False,
        )
        model = get_peft_model(copy.deepcopy(base, dict(memo)), config)
        if fused:
            fuse(model, shared=shared, **fused)
        return Contender(model.train(), batch, onednn=fused.get("onednn", False))

    floor = copy.deepcopy(base, dict(memo))
    add_input_bias(floor, floor.config.hidden_size)
    made = {
        "floor": Contender(floor.train(), batch),
        "LoRA": adapted(False),
        "fused LoRA": adapted(False, onednn=False),
        "DoRA": adapted(True),
        "fused DoRA": adapted(True, onednn=False),
    }
    if device.type == "cpu" and products.onednn_linear() is not None:
        made["fused LoRA, oneDNN"] = adapted(False, onednn=True)
        made["fused DoRA, oneDNN"] = adapted(True, onednn=True)
    return made


def measure(runs: dict[str, Contender], repetitions: int) -> dict[str, list[float]]:
    for run in runs.values():
        run()  # warm-up, and the optimiser's state
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--own-masks", action="store_true", help="every module draws its own dropout, as in PEFT")
    options: Any = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.device}, {options.threads} thread(s), {options.repetitions} repetitions, rank {RANK}")
    print("| shape | dropout | | ms | / floor | / PEFT's | saved, MiB |")
    print("|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for dropout in options.dropouts:
            runs = contenders(shape, dropout, options.device, not options.own_masks)
            saved = {name: run.saved_mib() for name, run in runs.items()}
            seconds = measure(runs, options.repetitions)
            for name in runs:
                peft = "DoRA" if "DoRA" in name else "LoRA"
                print(
                    f"| {shape} | {dropout} | {name} | {1000 * statistics.median(seconds[name]):.0f} "
                    f"| {ratio(seconds, name, 'floor'):.3f} | {ratio(seconds, name, peft):.3f} | {saved[name]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
