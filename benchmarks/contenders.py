"""The contenders of benchmarks: one frozen base model, shared by all, with PEFT's adapters and with lorank's methods.

lorank's methods use the public ``lorank.attach`` with its defaults, so a timed step includes all work of the method. No
allocation happens while steps are timed, because the configured run is too long to reach one.
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
from lorank.scoring import BalancedScorer

RANK = 8
LONG = 100_000
"""Optimiser steps of the configured run: more than any benchmark takes, so no allocation is due."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Base:
    """A frozen model.

    Args:
        shape: the shapes of the model and of its batch.
        device: the model's device.
        dtype: the data type of its weights and of the adapters.
        quantised: ``"nf4"``: all linear maps except the head in bitsandbytes' 4 bits; ``"plain"``: not quantised.
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
        """Random tokens; every position has a label."""
        size = (self.shape.rows, self.shape.tokens)
        ids = torch.randint(3, model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))
        ids = ids.to(self.device)
        return {"input_ids": ids, "labels": ids}


def to_nf4_(model: nn.Module) -> None:
    """Quantises all linear maps except the head to 4 bits, in place."""
    import bitsandbytes as bnb

    bnb.nn.Linear4bit.support_avx512bf16_for_cpu = (
        False  # it repacks the weights, and gradients no longer pass through them
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
    model.is_loaded_in_4bit = True  # PEFT reads this attribute


class Contender:
    """A model with its optimiser; a call is one training step.

    Args:
        model: the model with its adapter.
        batch: the batch of every step.
        after: called with the step's number after the optimiser's step.
    """

    def __init__(self, model: nn.Module, batch: Batch, after: Callable[[int], None] = lambda step: None) -> None:
        self.model, self.batch = model, batch
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)  # the Trainer's default
        self.ranks: lorank.Ranks | None = None
        self.start_seconds = 0.0
        self._after, self._steps = after, 0

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
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
        base: the model that all contenders share.
        dropout: dropout of LoRA's input.
        rank: rank of every adapted module.
    """

    def __init__(self, base: Base, dropout: float, *, rank: int = RANK) -> None:
        self.base, self.dropout, self.rank = base, dropout, rank
        self.model = base.build()
        self.batch = base.batch(self.model)

    def copy(self) -> nn.Module:
        """A copy of the modules that shares the base's weights."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(weight): weight for weight in weights})

    def floor(self) -> Contender:
        """The frozen model with one trainable bias at its input: the lowest cost that any adapter can have."""
        model = self.copy()
        embedding = model.get_input_embeddings()
        W = embedding.weight
        embedding.bias = nn.Parameter(torch.zeros(W.shape[1], device=W.device, dtype=W.dtype))
        embedding.register_forward_hook(lambda module, _, output: output + module.bias)
        return Contender(model, self.batch)

    def peft(self, *, fresh: bool = False, **settings: Any) -> nn.Module:
        """The model with PEFT's LoRA.

        Args:
            fresh: B = 0, as in a new adapter; else B is random, as in a trained adapter.
            settings: further fields of ``LoraConfig``.
        """
        common: dict[str, Any] = {"r": self.rank, "lora_alpha": self.rank, "init_lora_weights": fresh}
        common |= {"lora_dropout": self.dropout, "target_modules": self.base.shape.targets}
        config = LoraConfig(**{**common, **settings})
        return get_peft_model(self.copy(), config, autocast_adapter_dtype=False).train()

    def peft_adalora(self) -> Contender:
        """PEFT's AdaLoRA, with the call that its users must add to every step."""
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
        """One of lorank's methods, set up by ``lorank.attach``."""
        contender = Contender(self.peft(**lora), self.batch)
        contender.ranks = lorank.attach(
            contender.model,
            contender.optimizer,
            allocator,
            total_steps=total_steps,
            validation_batch=self.batch if allocator.needs_validation_batch else None,
            train_batches=[self.batch],
            progress=False,
        )
        return contender

    def ard(self) -> Contender:
        """ARD-LoRA with about as many parameters as the others: the heads of a module share the parameters of its
        LoRA."""
        layers = lorank.find_layers(self.peft(fresh=True))
        groups = head_groups(layers)
        # ARD-LoRA starts with one rank more than r0.
        r0 = {
            name: max(
                1, round(self.rank * (layer.d_in + layer.d_out) / _parameters_per_rank(layer, groups.get(name))) - 1
            )
            for name, layer in layers.items()
        }
        patterns = {f"^{name}$": rank for name, rank in r0.items()}
        return self.attached(lorank.ARDLoRA(alpha_lr=5e-5), fresh=True, rank_pattern=patterns)


def _parameters_per_rank(layer: AdapterLayer, groups: HeadGroups | None) -> int:
    """Trained parameters of a module with one rank per group."""
    if groups is None:
        return layer.d_in + layer.d_out
    return groups.count * (groups.size + (layer.d_in if groups.kind == "rows" else layer.d_out))


@dataclass(frozen=True)
class Watched(lorank.StaticLoRA):
    """Static LoRA that adds up Gramians in every step, as BalancedLoRA does before its cuts."""

    @property
    def watches_passes(self) -> bool:
        return True

    def start(self, layers: lorank.AdapterLayers, run: lorank.TrainingInfo) -> dict[str, Tensor]:
        return BalancedScorer().start(layers, run)

    def before_step(self, context: lorank.Context, state: dict[str, Tensor]) -> None:
        BalancedScorer().before_step(context, state)


def contenders(base: Base, dropout: float) -> dict[str, Contender]:
    """The contenders by name, one per row of the table."""
    make = Maker(base, dropout)
    return {
        "floor": make.floor(),
        "PEFT LoRA": Contender(make.peft(), make.batch),
        "PEFT DoRA": Contender(make.peft(use_dora=True), make.batch),
        "PEFT AdaLoRA": make.peft_adalora(),
        "static": make.attached(lorank.StaticLoRA()),
        "… with Gramians": make.attached(Watched()),
        "ALoRA": make.attached(lorank.ALoRA(unit="epochs")),
        "ARD-LoRA": make.ard(),
        "AdaLoRA": make.attached(lorank.AdaLoRA(t_init=0, t_final=1, delta_t=10)),
        "SoRA": make.attached(lorank.SoRA()),
        "DoRA": make.attached(lorank.StaticLoRA(), use_dora=True),
    }
