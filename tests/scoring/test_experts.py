"""Scores of experts' parameters: gradients and Gramians against what autograd and a forward pass by hand give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lorank
from lorank.allocators.orthogonality import add_orthogonality_gradient_
from lorank.errors import AdapterError
from lorank.lora import AdapterLayer, AdapterLayers, find_layers
from lorank.lora.gramians import Gramians
from lorank.scoring import ablation_scores, balanced_scores, saliency_scores, weight_gradient
from lorank.scoring.balanced import balance
from lorank.scoring.gramians import GramianPair, measure_gramians
from lorank.scoring.sensitivity import rank_products
from tests.models import adapted, token_batch
from tests.moe import EXPERTS, FAMILIES, Family, tiny_mixtral

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
BATCH = token_batch(padded=True)
CALLS = ("grouped_mm", "batched_mm", "eager")


def of(family: Family) -> tuple[PeftModel, AdapterLayers]:
    model = adapted(family.make(), **family.targets).eval()
    return model, find_layers(model)


def experts_of(layers: AdapterLayers) -> dict[str, AdapterLayer]:
    return {name: layer for name, layer in layers.items() if layer.is_expert}


class ByHand:
    """The experts' forward passes with their LoRA as a branch of its own, whose z and ẑ are kept."""

    def __init__(self, layers: AdapterLayers) -> None:
        self.kept: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in experts_of(layers)}
        self._layers = layers
        for name, layer in experts_of(layers).items():
            if name.endswith("gate_up_proj"):
                self._replace(name.rpartition(".")[0], layer.module.get_base_layer())

    def _replace(self, place: str, base: nn.Module) -> None:
        weights = {end: getattr(base, end).detach() for end in ("gate_up_proj", "down_proj")}
        kind = type(base).__name__

        def linear(end: str, x: Tensor, e: int) -> Tensor:
            layer, W = self._layers[f"{place}.{end}"], weights[end][e]
            A, B = layer.layout.by_expert(layer.A, 0)[e], layer.layout.by_expert(layer.B, 1)[e]
            y = x @ W.T if kind == "MixtralExperts" else x @ W
            # tokens meet B first where the parameter is (inputs, outputs) and PEFT does not know it
            z = x @ B if kind == "Llama4TextExperts" else x @ A.T
            z.retain_grad()
            self.kept[f"{place}.{end}"].append((e, z))
            return y + layer.scaling * (z @ A if kind == "Llama4TextExperts" else z @ B.T)

        def one(x: Tensor, e: int) -> Tensor:
            y = linear("gate_up_proj", x, e)
            if kind == "GptOssExperts":
                return linear("down_proj", base._apply_gate(y + base.gate_up_proj_bias[e]), e) + base.down_proj_bias[e]
            gate, up = y.chunk(2, dim=-1)
            return linear("down_proj", F.silu(gate) * up, e)

        def forward(x: Tensor, index: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
            if index is None or weight is None:  # Llama 4: every expert sees every token
                parts = x.view(EXPERTS, -1, x.shape[-1])
                return torch.cat([one(parts[e], e) for e in range(EXPERTS)])
            out = torch.zeros_like(x)
            for e in range(EXPERTS):
                token, place = (index == e).nonzero(as_tuple=True)
                out = out.index_add(0, token, one(x[token], e) * weight[token, place, None])
            return out

        base.forward = forward  # type: ignore[method-assign]

    def pair(self, name: str, labels: int) -> GramianPair:
        rank = self._layers[name].rank
        Z, D = (torch.zeros(EXPERTS, rank, rank, dtype=torch.float64) for _ in range(2))
        count = torch.zeros(EXPERTS, dtype=torch.float64)
        largest = max(float(z.grad.abs().max()) for _, z in self.kept[name] if z.grad is not None and len(z))
        for e, z in self.kept[name]:
            assert z.grad is not None
            dz = z.grad.double()
            counted = dz.abs().amax(1) > 1e-6 * largest
            own = z.detach().double()[counted]
            Z[e], D[e], count[e] = own.T @ own, labels * dz.T @ dz, counted.sum()
        return GramianPair(Z / count.clamp_min(1)[:, None, None], D)


@pytest.mark.parametrize(
    ("name", "call"),
    [*(("mixtral", call) for call in CALLS), ("gpt_oss", "grouped_mm"), ("gpt_oss", "eager"), ("llama4", "eager")],
)
def test_gramians_are_those_of_a_forward_pass_by_hand(name: str, call: str) -> None:
    model, layers = of(FAMILIES[name])
    model.config._experts_implementation = call
    found = measure_gramians(model, layers, [BATCH])
    by_hand = ByHand(layers)
    loss = model(**BATCH).loss
    loss.backward()
    labels = int((BATCH["labels"][:, 1:] != -100).sum())
    for key, layer in experts_of(layers).items():
        expected = by_hand.pair(key, labels)
        assert expected.D.abs().amax() > 0
        # Z and D change places where the tokens meet B first; worth and basis depend on their product
        swapped = name == "llama4"
        for e in range(EXPERTS):
            Z, D = (found[key].D, found[key].Z) if swapped else (found[key].Z, found[key].D)
            factor = expected.Z[e].norm() / Z[e].norm()
            torch.testing.assert_close(Z[e] * factor, expected.Z[e], rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(D[e] / factor, expected.D[e], rtol=1e-3, atol=1e-3 * float(expected.D[e].norm()))
            assert swapped or abs(float(factor) - 1) < 1e-4
        sigma = torch.linalg.eigvals(expected.Z @ expected.D).real.sort(dim=1, descending=True).values.sum(0)
        torch.testing.assert_close(balance(layer, found[key]).worth, sigma, rtol=1e-3, atol=1e-3 * float(sigma[0]))


def test_gramians_with_gradient_checkpointing_are_the_same() -> None:
    model, layers = of(FAMILIES["mixtral"])
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        gramians = Gramians(layers)
        model(**BATCH).loss.backward()
        found.append({name: (own.Z, own.D) for name, own in gramians.sums.items()})
        gramians.remove()
    for name, (Z, D) in found[0].items():
        torch.testing.assert_close(found[1][name], (Z, D), rtol=1e-5, atol=1e-9)


def test_an_unknown_use_of_the_weights_is_refused_in_the_first_pass() -> None:
    model, layers = of(FAMILIES["mixtral"])
    base = layers["model.layers.1.mlp.experts.down_proj"].module.get_base_layer()
    forward: Callable[..., Any] = base.forward

    def odd(*args: Any) -> Any:
        return forward(*args) + base.down_proj.sum() * 0

    base.forward = odd  # type: ignore[method-assign]
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.experts\.down_proj: the model uses.*\(sum\)"):
        balanced_scores(model, layers, [BATCH])
    base.forward = forward  # type: ignore[method-assign]
    balanced_scores(model, layers, [BATCH])  # nothing was left behind


@pytest.mark.parametrize("limit", [2**18, 10], ids=["whole", "projected"])
@pytest.mark.parametrize("family", [FAMILIES["mixtral"], FAMILIES["gpt_oss"]], ids=["mixtral", "gpt_oss"])
def test_gradients_are_those_of_autograd(family: Family, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "FULL_GRADIENT_SIZE", limit)
    model, layers = of(family)
    batches = [token_batch(seed=seed) for seed in range(2)]
    found = weight_gradient.weight_gradients(model, layers, batches, 5)
    residual = weight_gradient.residual_gradients(model, layers, batches, {name: [3] for name in layers})
    for name, layer in experts_of(layers).items():
        parameter = layer.module.get_param()
        assert not parameter.requires_grad
        parameter.requires_grad_(True)
        G = sum(torch.autograd.grad(model(**batch).loss, [parameter])[0].double() for batch in batches) / 2
        parameter.requires_grad_(False)
        G = G if layer.module._did_swap_in_out_features else G.mT  # (E, d_out, d_in)
        A = layer.layout.by_expert(layer.A.detach().double(), 0)
        outside = torch.eye(A.shape[2], dtype=torch.float64) - torch.linalg.pinv(A) @ A
        error = 1e-6 if limit > 10 else 0.1  # the range finder is never above, and close for the largest
        for one, part in ((found[name], G), (residual[name][0], G @ outside)):
            expected = torch.linalg.svdvals(part).square().sum(0).sqrt()[: len(one.values)]
            assert bool((one.values <= expected * (1 + 1e-6)).all())
            torch.testing.assert_close(one.values, expected, rtol=error, atol=1e-9)
        right = residual[name][0].right.reshape(EXPERTS, -1, 3)
        assert float((A @ right).abs().max()) < 1e-10
        torch.testing.assert_close(right.mT @ right, torch.eye(3, dtype=torch.float64).expand(EXPERTS, 3, 3))


def test_a_gradient_start_lowers_the_loss_more_than_a_random_one() -> None:
    losses = []
    for start in (False, True):
        model = adapted(tiny_mixtral(), random_B=False, target_modules=[], target_parameters=["experts.down_proj"])
        if start:
            lorank.gradient_start_(model, [BATCH], ranks="keep")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            loss = model(**BATCH).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(model(**BATCH).loss.detach()))
    assert losses[1] < losses[0]


def test_products_and_the_regulariser_are_summed_over_experts() -> None:
    model, layers = of(FAMILIES["mixtral"])
    model(**BATCH).loss.backward()
    found = dict(zip(layers, torch.split(rank_products(layers), list(layers.ranks.values())), strict=True))
    own = {name: [weight.grad.clone() for weight in (layer.A, layer.B)] for name, layer in layers.items()}
    add_orthogonality_gradient_(layers, 0.1)
    for name, layer in experts_of(layers).items():
        A, B = (weight.detach().clone().requires_grad_() for weight in (layer.A, layer.B))
        rows, columns = layer.layout.by_expert(A, 0), layer.layout.by_expert(B, 1)
        eye = torch.eye(layer.rank)
        penalty = (rows @ rows.mT - eye).square().sum() + (columns.mT @ columns - eye).square().sum()
        for weight, before, extra in zip(
            (layer.A, layer.B), own[name], torch.autograd.grad(penalty, [A, B]), strict=True
        ):
            torch.testing.assert_close(weight.grad - before, 0.1 * extra, rtol=1e-4, atol=1e-5)
        expected = (layer.layout.by_expert(own[name][0], 0) * layer.layout.by_expert(layer.A.detach(), 0)).sum((0, 2))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-8)


def test_both_engines_and_saliency_see_the_same_ranks() -> None:
    model, layers = of(FAMILIES["mixtral"])
    exact = ablation_scores(model, layers, BATCH, terms="without")
    reference = ablation_scores(model, layers, BATCH, terms="without", engine="reference")
    assert exact.engine == "exact", exact.notice
    saliency = saliency_scores(model, layers, [BATCH])
    for name, layer in layers.items():
        torch.testing.assert_close(exact.scores[name], reference.scores[name], rtol=1e-3, atol=1e-5)
        assert saliency[name].shape == (layer.rank,)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_a_point_of_the_rank_curve_makes_an_adapter_of_these_ranks() -> None:
    model, _ = of(FAMILIES["mixtral"])
    curve = lorank.rank_curve(model, [BATCH])
    for budget in ("50%", "20%"):
        wanted = {name: rank for name, rank in curve.at(budget).ranks.items() if rank}
        made = find_layers(get_peft_model(tiny_mixtral(), LoraConfig(**curve.lora_config(budget))))
        assert made.ranks == wanted
        assert made.parameters == curve.at(budget).parameters
