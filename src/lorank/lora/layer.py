"""Views on one LoRA layer of PEFT, and on all of them: A, B, the gate, s and the rank.

    y = W x + s · B (g ⊙ (A x))        A: (r, d_in)   B: (d_out, r)   g: (r,)   s: constant

Layers are found once, by the classes of their modules, never by patterns in parameter names. The rest of the package
accesses PEFT's tensors through these two classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lorank.errors import AdapterError
from lorank.lora.experts import is_expert
from lorank.lora.gates import LearnedGates
from lorank.lora.gramian_sums import CollectedGramians
from lorank.lora.kernels.per_head import HeadGroups
from lorank.lora.pool import Pool, pool_of
from lorank.lora.rank_layout import layout_of
from lorank.lora.scaling import alpha_for, scaling_of
from lorank.lora.variants.convolution import EmptyConvolution, is_convolution
from lorank.lora.variants.dora import is_dora
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.gated import GatedLora, update_plain_lora_hooks
from lorank.lora.variants.per_head import HeadLora

TARGET_FIELDS = ("target_modules", "target_parameters", "layers_to_transform", "layers_pattern")
"""The fields of a ``LoraConfig`` that say which modules and parameters have a LoRA."""


class AdapterLayer:
    """The LoRA of one module: a view, never a copy.

    Args:
        name: full name of the module in the base model, e.g. ``model.layers.0.self_attn.q_proj``.
        module: PEFT's LoRA layer.
        adapter: the name of the adapter.
        bias: PEFT's setting of which biases of the base model are trained: none, all or lora_only.
        path: the name of ``module`` in the base model; None: ``name``. They differ for the LoRA of a parameter, which
            is named after the parameter (:mod:`lorank.lora.experts`).

    Attributes:
        layout: where the entries of a rank are in A and B.
    """

    def __init__(self, name: str, module: LoraLayer, adapter: str, bias: str = "none", path: str | None = None) -> None:
        self.name = name
        self.path = name if path is None else path
        self.module = module
        self.adapter = adapter
        self.layout = layout_of(module)
        self.is_expert = is_expert(module)
        self.is_embedding = adapter in module.lora_embedding_A
        self.is_convolution = is_convolution(module)
        self.axes = self.layout.axes
        self.use_rslora = bool(module.use_rslora[adapter])
        self._trains_base_bias = bias != "none" and getattr(module.get_base_layer(), "bias", None) is not None
        stated = self._scaling_from_alpha()
        # alpha = s·r, divided by r, may differ from s in the last bit.
        self._file_scaling = self.scaling if not stated or math.isclose(stated, self.scaling) else stated

    @property
    def scaling(self) -> float:
        """s, the factor of the update in the forward pass. It stays through every resize."""
        return float(self.module.scaling[self.adapter])

    @property
    def file_scaling(self) -> float:
        """The factor that PEFT's alpha states, and that a file holds.

        It is s, unless the user has changed s with PEFT's ``set_scale`` or ``scale_layer``, which leave alpha.
        """
        rank = self.module.r[self.adapter]
        if rank and self.module.lora_alpha[self.adapter] != alpha_for(self._file_scaling, rank, self.use_rslora):
            self._file_scaling = self._scaling_from_alpha()  # the user has changed alpha, or PEFT has
        return self._file_scaling

    @property
    def scaling_is_from_alpha(self) -> bool:
        """Whether s is the factor that alpha states, so that the user has not changed it."""
        return math.isclose(self.scaling, self.file_scaling)

    def _scaling_from_alpha(self) -> float:
        """0 at rank 0, where alpha is 0 too."""
        return scaling_of(self.module.lora_alpha[self.adapter], self.module.r[self.adapter], self.use_rslora)

    @property
    def A(self) -> nn.Parameter:
        """``lora_A``, (r, d_in); for an embedding (r, number of embeddings); for heads that own columns (r, d_h).

        For a convolution with G groups (G · r, inputs, kernel…); for the parameter of E experts (E · r, inputs of one
        expert), see :mod:`lorank.lora.rank_layout`.
        """
        return self.stored[0] if self.pool is None else self.pool.A

    @property
    def B(self) -> nn.Parameter:
        """``lora_B``, (d_out, r); for an embedding (embedding width, r); for heads that own rows (d_h, r).

        For a convolution (d_out, r, 1…); for the parameter of E experts (outputs of one expert, r · E).
        """
        return self.stored[1] if self.pool is None else self.pool.B

    @property
    def A_matrix(self) -> Tensor:
        """A as (r, d_in), without a graph: a view where that is possible. In per-head form as it is."""
        return self.axes[0].matrix(self.A.detach())

    @property
    def B_matrix(self) -> Tensor:
        """B as (d_out, r), without a graph: a view where that is possible. In per-head form as it is."""
        return self.axes[1].matrix(self.B.detach())

    @property
    def stored(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The model's own parameters: A and B, or with a pool the padded ones, (R, d_in) and (d_out, R)."""
        module, adapter = self.module, self.adapter
        if self.is_embedding:
            return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight

    @property
    def pool(self) -> Pool | None:
        """The live ranks, if the model's parameters have a fixed shape (:func:`lorank.reserve_`); else None."""
        return pool_of(self.module, self.adapter)  # type: ignore[no-any-return]  # kept on PEFT's layer

    @property
    def rank(self) -> int:
        """r, the number of ranks that A and B hold. ≥ 0."""
        return self.axes[0].rank(self.A)

    def module_rank(self, rank: int) -> int:
        """What PEFT calls r if the layer has ``rank`` ranks: in a convolution, ranks times groups."""
        return rank * self.layout.groups

    @property
    def d_in(self) -> int:
        """Number of inputs of the module, in every form of A: what a rank trains in A.

        In a convolution, inputs × kernel (× groups); of experts, of all together.
        """
        groups = self.groups
        return self._width_of_A if groups is None or groups.kind == "rows" else groups.count * groups.size

    @property
    def d_out(self) -> int:
        """Number of outputs of the module, in every form of B; of all its experts together, if it has any."""
        groups = self.groups
        own = int(self.B.shape[0]) * self.layout.experts
        return own if groups is None or groups.kind == "columns" else groups.count * groups.size

    @property
    def rank_parameters(self) -> int:
        """Trained parameters per rank: d_in + d_out, or fewer in per-head form."""
        return self._width_of_A + int(self.B.shape[0]) * self.layout.experts

    @property
    def _width_of_A(self) -> int:
        """What a rank trains in A, as A is."""
        return self.A.shape[1:].numel() * self.axes[0].copies

    @property
    def max_rank(self) -> int:
        """min(d_in, d_out), the rank of a full update.

        In per-head form, the sum over all heads. In a convolution with groups or a parameter with experts, the rank of
        the update of one of them. With a pool, at most its capacity.
        """
        groups = self.groups
        if groups is not None:
            return groups.count * groups.capacity(self.d_in, self.d_out)
        most = min(self.d_in, self.d_out) // self.layout.blocks
        return most if self.pool is None else min(most, self.pool.capacity)

    @property
    def groups(self) -> HeadGroups | None:
        """The heads, if the layer is in per-head form (:func:`lorank.lora.split_into_heads_`); else None."""
        heads = self.form
        return heads.groups if isinstance(heads, HeadLora) else None

    @property
    def head_ranks(self) -> tuple[int, ...]:
        """r_h of every head, (H,), in per-head form; else (r,), one group."""
        heads = self.form
        return heads.ranks if isinstance(heads, HeadLora) else (self.rank,)

    def set_heads(self, groups: HeadGroups | None, ranks: Sequence[int] = ()) -> None:
        """Marks A and B as the blocks of heads, or (None) as a plain LoRA. The caller changes their shapes."""
        gate, former = self.gate, self.form
        self.gate = None
        if groups is None:
            self.module.lora_variant.pop(self.adapter, None)
        else:
            self.module.lora_variant[self.adapter] = HeadLora(
                groups, ranks, former.dropout if isinstance(former, HeadLora) else None
            )
        self.gate = gate

    @property
    def min_rank(self) -> int:
        """The lowest allowed rank: 1 if the layer trains something beside A and B (:attr:`companion`), else 0."""
        return int(self.companion is not None)

    @property
    def companion(self) -> str | None:
        """What the layer trains beside A and B, in words, or None.

        A file has no entry for a module without a LoRA, so this would be lost with the last rank. It is DoRA's
        magnitudes, a bias in lora_B (``lora_bias=True``), or the bias of the base layer (``bias="all"`` or
        ``"lora_only"``).
        """
        if self.uses_dora:
            return "DoRA"
        if not self.is_embedding and self.module.lora_B[self.adapter].bias is not None:
            return "lora_bias"
        return "a trained bias" if self._trains_base_bias else None

    @property
    def uses_dora(self) -> bool:
        """Whether the layer is a DoRA."""
        return is_dora(self.form)

    @property
    def form(self) -> Any:
        """The variant without gate and fused forward: PEFT's DoRA, :class:`HeadLora`, or None for a plain LoRA."""
        variant = self._ungated()
        return variant.replaced if isinstance(variant, FusedLora) else variant

    def _ungated(self) -> Any:
        variant = self.module.lora_variant.get(self.adapter)
        return variant.replaced if isinstance(variant, GatedLora) else variant

    @property
    def gate(self) -> Tensor | None:
        """g: None (all ones), (r,), or (n, r) with a gate per sample of the batch.

        Raises:
            AdapterError: on assignment, the gate has another shape, or experts get a gate per sample.
        """
        variant = self.module.lora_variant.get(self.adapter)
        return variant.gate if isinstance(variant, GatedLora) else None

    @gate.setter
    def gate(self, gate: Tensor | None) -> None:
        own = self._ungated()
        if gate is None:
            self.module.lora_variant.pop(self.adapter, None)
            if own is not None:
                self.module.lora_variant[self.adapter] = own
            update_plain_lora_hooks(self.module)
            return
        if gate.dim() not in (1, 2) or gate.shape[-1] != self.rank:
            raise AdapterError(
                f"a gate for {self.name} must have shape ({self.rank},) or (samples, {self.rank}), "
                f"got {tuple(gate.shape)}"
            )
        if gate.dim() == 2 and self.is_expert:
            raise AdapterError(
                f"{self.name} is a parameter with a LoRA: all samples use one weight, so none has its own gate"
            )
        variant = self.module.lora_variant.get(self.adapter)
        if isinstance(variant, GatedLora):
            variant.gate = gate
        else:
            self.module.lora_variant[self.adapter] = GatedLora(gate, own)
            update_plain_lora_hooks(self.module)

    def note_rank(self) -> None:
        """Tells PEFT's modules the present rank, after a change of A and B."""
        if self.is_embedding:
            return
        lora_A, lora_B = self.module.lora_A[self.adapter], self.module.lora_B[self.adapter]
        if not self.is_convolution:
            lora_A.out_features = lora_B.in_features = int(self.A.shape[0])
            return
        lora_A.out_channels = lora_B.in_channels = self.module_rank(self.rank)
        table, variant = self.module.lora_variant, self._ungated()
        if not self.rank:  # torch cannot compute a convolution without channels
            variant = variant or EmptyConvolution()
        elif isinstance(variant, EmptyConvolution):
            variant = None
        gated = table.get(self.adapter)
        if isinstance(gated, GatedLora):
            gated.replaced = variant
        elif variant is None:
            table.pop(self.adapter, None)
        else:
            table[self.adapter] = variant

    def __repr__(self) -> str:
        return f"AdapterLayer({self.name}, rank={self.rank}, d_in={self.d_in}, d_out={self.d_out}, s={self.scaling:g})"


class AdapterLayers(Mapping[str, AdapterLayer]):
    """All LoRA layers of one adapter, by full module name, in the order of the model.

    Attributes:
        model: the model that contains the layers.
        adapter: the adapter's name.
        gates: the trainable gates of all layers, after :meth:`learn_gates`; else None.
        gramians: second moments of what goes through every rank, while a method needs them in training; else None.
        prefix: the prefix of a layer's name in ``model``, e.g. ``base_model.model.``.
    """

    def __init__(
        self, model: nn.Module, adapter: str, config: LoraConfig, layers: Mapping[str, AdapterLayer], prefix: str = ""
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.adapter = adapter
        # PEFT keeps one configuration in the dictionaries of several modules.
        tables = [vars(module).get(field) for module in model.modules() for field in ("peft_config", "_peft_config")]
        self._configs = [table for table in tables if isinstance(table, dict) and table.get(adapter) is config]
        self.gates: LearnedGates | None = None
        self.gramians: CollectedGramians | None = None
        self._layers = dict(layers)
        # The user's settings. They are restored when no module has rank 0.
        self.targets = {name: getattr(config, name) for name in TARGET_FIELDS}

    def __getitem__(self, name: str) -> AdapterLayer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def config(self) -> LoraConfig:
        """The adapter's live ``LoraConfig``.

        :func:`lorank.lora.resize_` puts a copy with the present ranks and alphas in its place, so that
        ``model.save_pretrained`` writes a correct adapter at any time, and the user's own object stays as it was.
        """
        return self._configs[0][self.adapter]

    @config.setter
    def config(self, config: LoraConfig) -> None:
        for table in self._configs:
            table[self.adapter] = config

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module, in order."""
        return {name: layer.rank for name, layer in self.items()}

    @property
    def total_rank(self) -> int:
        """Σ r over all modules."""
        return sum(layer.rank for layer in self.values())

    @property
    def parameters(self) -> int:
        """Number of elements of A and B over all modules, in the form in which they are trained."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.values())

    def learn_gates(self, values: Tensor | None = None, device: torch.device | None = None) -> LearnedGates:
        """Gives every layer a gate that receives gradients. The optimiser does not hold the gates.

        Args:
            values: (R,) for all ranks of all layers, in order; None: ones.
            device: the device of the gates; None: that of the first layer.

        Raises:
            ValueError: ``values`` has another shape.
        """
        self.gates = LearnedGates(self.ranks, values, device if device is not None else self._device())
        for name, leaf in self.gates.leaves.items():
            self[name].gate = leaf
        return self.gates

    def drop_gates(self) -> None:
        """Removes every gate without folding it into B."""
        self.gates = None
        for layer in self.values():
            layer.gate = None

    def _device(self) -> torch.device:
        return next(iter(self.values())).A.device
