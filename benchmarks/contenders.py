"""What benchmarks compare: one frozen base model, shared by all, with PEFT's adapters and lorank's methods on it.

lorank's come by the public ``lorank.attach`` with its defaults, so their steps hold all that a method does per step.
Nothing is allocated while steps are timed: the runs that methods believe to be in are too long for that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import lorank
from benchmarks.shapes import Shape
from lorank.lora import AdapterLayer, HeadGroups, head_groups

RANK = 8
LONG = 100_000
"""Optimiser steps of the run that every method believes to be in."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Base:
    """A frozen model.

    Args:
        shape: its shape, and that of its batch.
        device: where it is.
        dtype: of its weights and of the adapters on it.
        quantised: ``"nf4"``: every linear map but the head in bitsandbytes' 4 bits; ``"plain"``: none.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    quantised: str = "plain"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = self.shape.make()
        finally:
            torch.set_default_dtype(usual)
        if self.quantised == "nf4":
            to_nf4_(model)
        return model.requires_grad_(False).train()

    def batch(self, model: nn.Module) -> Batch:
        """Random tokens, every position labelled."""
        size = (self.shape.rows, self.shape.tokens)
        ids = torch.randint(3, model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))
        ids = ids.to(self.device)
        return {"input_ids": ids, "labels": ids}


def to_nf4_(model: nn.Module) -> None:
    """Every linear map but the head in 4 bits, quantised from the weights that are there."""
    import bitsandbytes as bnb

    bnb.nn.Linear4bit.support_avx512bf16_for_cpu = (
        False  # as docs of quantised bases say: it repacks, and stops gradients
    )
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is head:
                continue
            W = child.weight
            new = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=W.dtype,
                quant_type="nf4",
                device="meta",
            )
            new.weight = bnb.nn.Params4bit(W.detach(), requires_grad=False, quant_type="nf4", module=new)
            new.bias = child.bias
            setattr(parent, name, new.to(W.device))  # quantises
    model.is_loaded_in_4bit = True  # how PEFT knows


class Contender:
    """A model with its optimiser; a call is one training step.

    Args:
        after: called with the number of the step, after the optimiser's.
    """

    def __init__(self, model: nn.Module, batch: Batch, after: Callable[[int], None] = lambda step: None) -> None:
        self.model, self.batch = model, batch
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)  # the Trainer's default
        self.ranks: lorank.Ranks | None = None
        self._after, self._steps = after, 0

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained)

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self._steps += 1
        self._after(self._steps)
        self.optimizer.zero_grad()


class Maker:
    """Makes contenders on one base.

    Args:
        base: the model they share.
        dropout: of LoRA's input.
    """

    def __init__(self, base: Base, dropout: float, *, rank: int = RANK) -> None:
        self.base, self.dropout, self.rank = base, dropout, rank
        self.model = base.build()
        self.batch = base.batch(self.model)

    def copy(self) -> nn.Module:
        """Modules of its own, the base's weights shared."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(weight): weight for weight in weights})

    def floor(self) -> Contender:
        """The frozen model with one trainable bias at its input: the least that any adapter must pay."""
        model = self.copy()
        embedding = model.get_input_embeddings()
        W = embedding.weight
        embedding.bias = nn.Parameter(torch.zeros(W.shape[1], device=W.device, dtype=W.dtype))
        embedding.register_forward_hook(lambda module, _, output: output + module.bias)
        return Contender(model, self.batch)

    def peft(self, *, fresh: bool = False, **settings: Any) -> nn.Module:
        """The model with PEFT's LoRA.

        Args:
            fresh: B = 0, as an adapter starts; else random, as one that has been trained.
        """
        common: dict[str, Any] = {"r": self.rank, "lora_alpha": self.rank, "init_lora_weights": fresh}
        common |= {"lora_dropout": self.dropout, "target_modules": self.base.shape.targets}
        config = LoraConfig(**{**common, **settings})
        return get_peft_model(self.copy(), config, autocast_adapter_dtype=False).train()

    def peft_adalora(self) -> Contender:
        """PEFT's AdaLoRA, with the call that its users must make in every step."""
        config = AdaLoraConfig(
            init_r=self.rank,
            target_r=self.rank // 2,
            lora_alpha=self.rank,
            lora_dropout=self.dropout,
            target_modules=self.base.shape.targets,
            tinit=0,
            tfinal=1,
            deltaT=10,
            total_step=LONG,
        )
        model = get_peft_model(self.copy(), config, autocast_adapter_dtype=False).train()
        return Contender(model, self.batch, model.base_model.update_and_allocate)

    def attached(self, allocator: lorank.Allocator, *, total_steps: int = LONG, **lora: Any) -> Contender:
        """One of lorank's methods, as ``lorank.attach`` sets it up."""
        contender = Contender(self.peft(**lora), self.batch)
        contender.ranks = lorank.attach(
            contender.model,
            contender.optimizer,
            allocator,
            total_steps=total_steps,
            validation_batch=self.batch if allocator.needs_validation_batch else None,
            progress=False,
        )
        return contender

    def ard(self) -> Contender:
        """ARD-LoRA with about as many parameters as the others: heads share out what their module's LoRA would have."""
        layers = lorank.find_layers(self.peft(fresh=True))
        groups = head_groups(layers)
        # It stores a rank more than r0 at first.
        r0 = {
            name: max(1, round(self.rank * (layer.d_in + layer.d_out) / _numbers_per_rank(layer, groups.get(name))) - 1)
            for name, layer in layers.items()
        }
        patterns = {f"^{name}$": rank for name, rank in r0.items()}
        return self.attached(lorank.ARDLoRA(), fresh=True, rank_pattern=patterns)


def _numbers_per_rank(layer: AdapterLayer, groups: HeadGroups | None) -> int:
    """What a module with a rank of one per group trains."""
    if groups is None:
        return layer.d_in + layer.d_out
    return groups.count * (groups.size + (layer.d_in if groups.kind == "rows" else layer.d_out))


def contenders(base: Base, dropout: float) -> dict[str, Contender]:
    """The rows of the table, by name."""
    make = Maker(base, dropout)
    return {
        "floor": make.floor(),
        "PEFT LoRA": Contender(make.peft(), make.batch),
        "PEFT DoRA": Contender(make.peft(use_dora=True), make.batch),
        "PEFT AdaLoRA": make.peft_adalora(),
        "static": make.attached(lorank.StaticLoRA()),
        "ALoRA": make.attached(lorank.ALoRA()),
        "ARD-LoRA": make.ard(),
        "AdaLoRA": make.attached(lorank.AdaLoRA(t_init=0, t_final=1, delta_t=10)),
        "SoRA": make.attached(lorank.SoRA()),
        "DoRA": make.attached(lorank.StaticLoRA(), use_dora=True),
    }
