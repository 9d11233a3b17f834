"""Balanced truncation: what ranks are worth, in the basis in which this question has an answer.

B A = (B M⁻¹)(M A) for every invertible M, so a single row of A and column of B mean nothing by themselves. The Gramians
Z and D (:mod:`lorank.scoring.gramians`) say which directions the data use, and which ones the loss feels. In the
Kronecker-factored empirical Fisher metric, a change s · B M A of the module's update costs ½ tr(D M Z Mᵀ). In the basis
in which Z and D are diagonal together, taking rank i away costs ½ σ_i², where the σ_i² are the eigenvalues of Z D. This
is balanced truncation (Moore, IEEE Trans. Automatic Control 1981); the σ_i are the Hankel singular values. They are in
units of the loss, so ranks of all modules compare.

    Z = L Lᵀ        Lᵀ D L = V Λ Vᵀ        T = L V        A ← S T⁻¹ A        B ← B T S⁻¹        Λ = diag(σ²), descending

S rescales the ranks, so that every row of A has the mean norm that the rows had before: a learning rate then means what
it meant. The model's function does not change.

Experts are balanced one by one, with the tokens that reach them. They share the number of ranks, so rank i is the i-th
of every expert, and its worth is the sum over the experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorank.errors import NonFiniteError, ValidationBatchError
from lorank.lora import AdapterLayer, AdapterLayers
from lorank.lora.basis import Basis
from lorank.scoring.ablation_variants import IncompatibleError
from lorank.scoring.context import Context, State, TrainingInfo
from lorank.scoring.gramians import GramianPair, measure_gramians, sum_shape
from lorank.scoring.loss import prepare_batch
from lorank.scoring.microbatch import split
from lorank.scoring.scorer import Choose, Scorer, Scores

SMALLEST = 1e-7
"""Eigenvalues of Z below this part of the largest count as this part: float32 sums hold no smaller ones."""
ROWS = 8
"""Samples per batch where Gramians are measured on the validation batch."""
KINDS = ("Z", "D", "tokens")
"""The sums of a layer (:class:`lorank.lora.LayerGramians`)."""


@dataclass(frozen=True)
class Balanced:
    """A module in its balanced basis.

    Attributes:
        worth: σ², (r,) float64, descending: twice the loss that the truncation of each rank is predicted to cost. Of
            all experts together, if there are any.
        basis: the basis.
    """

    worth: Tensor
    basis: Basis


def balance(layer: AdapterLayer, gramians: GramianPair) -> Balanced:
    """The balanced basis of one module.

    Args:
        layer: the layer. It is not changed.
        gramians: its Gramians.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    rank = layer.rank
    if not rank:
        empty = torch.zeros(0, 0, dtype=torch.float64)
        return Balanced(torch.zeros(0, dtype=torch.float64), Basis(empty, empty))
    Z, D = gramians.Z, gramians.D
    if not bool(Z.isfinite().all() and D.isfinite().all()):
        raise NonFiniteError(
            f"the Gramians of {layer.name} hold NaN or infinity: its weights or the gradients of the loss are not "
            "finite. Look at the batches and the loss on them; no rank was moved"
        )
    # (E, r, r) for experts, else (1, r, r)
    Z, D = (one.reshape(-1, rank, rank) for one in (Z, D))
    identity = torch.eye(rank, dtype=torch.float64)
    unreached = ~(torch.linalg.eigvalsh((Z + Z.mT) / 2)[:, -1:, None] > 0)  # (E, 1, 1): no token was there
    if bool(unreached.all()):
        return Balanced(torch.zeros(rank, dtype=torch.float64), Basis(identity, identity))
    Z, D = torch.where(unreached, identity, Z), torch.where(unreached, 0, D)
    values, vectors = torch.linalg.eigh((Z + Z.mT) / 2)  # ascending
    root = values.clamp_min(SMALLEST * values[:, -1:]).sqrt()  # (E, r)
    L, L_inverse = vectors * root[:, None, :], (vectors / root[:, None, :]).mT
    worth, V = torch.linalg.eigh(L.mT @ ((D + D.mT) / 2) @ L)
    worth, V = worth.flip(1).clamp_min(0), V.flip(2)
    T, T_inverse = L @ V, V.mT @ L_inverse
    # An eigenvector's sign is the library's choice, and may differ after a rounding error. Here its largest entry is
    # positive, so that a run is the same with the fused forward and without, and on other machines.
    sign = T.gather(1, T.abs().argmax(1, keepdim=True)).sign()  # (E, 1, r)
    T, T_inverse = T * sign, T_inverse * sign.mT
    # an embedding's B, and not its A, starts at random values
    weight = layer.B.mT[None] if layer.is_embedding else layer.layout.by_expert(layer.A, 0)  # (E, r, d)
    weight = weight.detach().double().cpu()
    matrix = T.mT if layer.is_embedding else T_inverse
    before = torch.linalg.vector_norm(weight, dim=2).mean(1, keepdim=True)  # (E, 1)
    after = torch.linalg.vector_norm(matrix @ weight, dim=2)  # (E, r)
    stretch = torch.where((after > 0) & (before > 0), before / after, torch.ones_like(after))
    if layer.is_embedding:
        stretch = 1 / stretch
    matrix, inverse = stretch[:, :, None] * T_inverse, T / stretch[:, None, :]
    matrix, inverse = torch.where(unreached, identity, matrix), torch.where(unreached, identity, inverse)
    if layer.layout.experts == 1:
        matrix, inverse = matrix[0], inverse[0]
    return Balanced(worth.sum(0), Basis(matrix, inverse))


@dataclass(frozen=True)
class BalancedScorer(Scorer):
    """Scores every rank of the balanced basis by σ², from Gramians summed up during training.

    Where the training loop's passes cannot be watched (``torch.compile``), Gramians are measured on the validation
    batch instead.
    """

    @property
    def watches_passes(self) -> bool:
        return True

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        """Sums of zero."""
        return _empty(layers)

    def before_step(self, context: Context, state: State) -> None:
        """Adds the Gramians of the passes since the last step, their mean over the processes.

        Left out are steps with sums that are not finite, and steps in which no gradient reached any rank (B = 0).
        """
        gramians = context.layers.gramians
        if gramians is None:
            return
        parts = {
            f"{kind}.{name}": _part(getattr(own, kind), state[f"{kind}.{name}"])
            for name, own in gramians.sums.items()
            for kind in KINDS
        }
        gramians.clear()
        if context.share is not None:  # now and not before a cut, because a checkpoint has one process's state
            parts = _mean_over_processes(context, parts)
        if not _largest(parts.values()).isfinite():
            return
        if not _largest(parts[f"tokens.{name}"] for name in gramians.sums) > 0:
            return
        for key, part in parts.items():
            state[key] += part
        state["steps"] += 1

    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        """σ² of every rank, and the basis in which they are the ranks.

        Raises:
            ValidationBatchError: no pass has been watched, and there is no validation batch.
        """
        layers, steps = context.layers, float(state["steps"])
        pairs = _mean(context, state) if steps else self._measured(context)
        found = {name: balance(layers[name], pair) for name, pair in pairs.items()}
        return Scores(
            {name: one.worth for name, one in found.items()},
            {"gramians": f"{steps:g} training steps" if steps else "the validation batch"},
            {name: one.basis for name, one in found.items()},
        )

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        """Begins the sums anew: those of the old ranks are of another basis."""
        state.update(_empty(context.layers))
        if context.layers.gramians is not None:
            context.layers.gramians.clear()

    def end(self, context: Context, state: State) -> None:
        """Stops watching."""
        for name in list(state):
            if name != "steps":
                del state[name]
        if context.layers.gramians is not None:
            context.layers.gramians.collecting = False

    def _measured(self, context: Context) -> dict[str, GramianPair]:
        if context.validation_batch is None:
            raise ValidationBatchError(
                "the passes of training could not be watched, so the Gramians must be measured on a batch of data, and "
                "none was given: use attach(…, validation_batch=batch)"
            )
        batch = prepare_batch(context.model, context.validation_batch, needs_labels=context.loss_fn is None)
        try:
            parts = split(batch, ROWS)
        except IncompatibleError:  # a batch of one's own kind, which only loss_fn knows
            parts = [batch]
        return measure_gramians(context.model, context.layers, parts, loss_fn=context.loss_fn)


def _empty(layers: AdapterLayers) -> State:
    state: State = {"steps": torch.zeros(())}
    for name, layer in layers.items():
        dtype = torch.promote_types(layer.A.dtype, torch.float32)
        for kind in KINDS:
            shape = sum_shape(layer)[:-2] if kind == "tokens" else sum_shape(layer)
            state[f"{kind}.{name}"] = torch.zeros(shape, dtype=dtype, device=layer.A.device)
    return state


def _part(own: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if own is None else own.to(like)


def _mean_over_processes(context: Context, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = context.mean(torch.cat([part.flatten().double().cpu() for part in parts.values()]))
    means = torch.split(flat, [part.numel() for part in parts.values()])
    return {key: mean.reshape(part.shape).to(part) for (key, part), mean in zip(parts.items(), means, strict=True)}


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest absolute entry of all tensors; NaN if there is one."""
    return torch.nn.utils.get_total_norm([one for one in tensors if one.numel()], norm_type=math.inf)


def _mean(context: Context, state: State) -> dict[str, GramianPair]:
    """The Gramians from the sums.

    The number of labels per batch is not known here. The largest number of tokens that the loss depends on in any
    module stands for it. It is one factor for all modules, so it changes no order.
    """
    layers, steps = context.layers, state["steps"].double().cpu()
    tokens = {name: state[f"tokens.{name}"].double().cpu() for name in layers}  # (), or (E,)
    labels = max(float(one.max()) for one in tokens.values()) / steps
    found: dict[str, GramianPair] = {}
    for name in layers:
        Z, D = (state[f"{kind}.{name}"].double().cpu() for kind in ("Z", "D"))
        count = torch.where(tokens[name] > 0, tokens[name], 1.0)[..., None, None]
        found[name] = GramianPair(Z / count, D * labels / steps)
    return found
