"""Another basis of the ranks: the function stays, and gradients and moments are those of the new basis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Adafactor

from lorank.errors import PlanError
from lorank.lora import AdapterLayers, LayerPlan, NewVectors, find_layers, optimizer_state, resize_
from lorank.lora.basis import Basis, turn_ranks
from lorank.scoring import balance, measure_gramians
from tests.lora.bases import basis_of, random_basis, signed_permutation
from tests.lora.forms import Q, gated, in_heads
from tests.lora.optimizers import train_step, trainable
from tests.lora.test_optimizer_conformance import AXES, STEPS, dense, gradients, layer_for, take_steps
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch
from tests.optimizers import ALL, OF_THE_TRAINER, QUANTISED, REFUSED
from tests.quantised import BASES

FORMS: dict[str, Callable[[], Any]] = {
    "linear": lambda: adapted(tiny_llama()),
    "conv1d": lambda: adapted(tiny_gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "embedding": lambda: adapted(tiny_llama(), target_modules=["embed_tokens", "v_proj"]),
    "dora": lambda: adapted(tiny_llama(), use_dora=True),
    "rslora": lambda: adapted(tiny_llama(), use_rslora=True, r=8),
    "bias": lambda: adapted(tiny_llama(attention_bias=True), lora_bias=True, target_modules=["q_proj", "o_proj"]),
    "dropout": lambda: adapted(tiny_llama(), lora_dropout=0.3),
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(**token_batch(padded=True)).logits
    return found


def keep_all(rank: int, basis: Basis, **others: Any) -> LayerPlan:
    return LayerPlan(tuple(range(rank)), basis=basis, **others)


def balanced_plans(model: nn.Module) -> dict[str, LayerPlan]:
    layers = find_layers(model)
    pairs = measure_gramians(model, layers, [token_batch(padded=True)])
    return {name: keep_all(layer.rank, balance(layer, pairs[name]).basis) for name, layer in layers.items()}


def random_plans(model: nn.Module) -> dict[str, LayerPlan]:
    layers = find_layers(model)
    return {
        name: keep_all(layer.rank, random_basis(layer.rank, seed, largest=3))
        for seed, (name, layer) in enumerate(layers.items())
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plans", [balanced_plans, random_plans])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_function_stays(form: str, plans: Callable[..., Any], dtype: torch.dtype, bound: float) -> None:
    model = FORMS[form]().to(dtype)
    before, layers = logits(model), find_layers(model)
    with model.disable_adapter():
        plain = logits(model)
    old = {name: layer.A.detach().clone() for name, layer in layers.items()}
    updates = {name: (layer.B.double() @ layer.A.double()).detach() for name, layer in layers.items()}
    resize_(layers, plans(model))
    after = logits(model)
    assert not any(torch.equal(layer.A, old[name]) for name, layer in layers.items())
    assert torch.linalg.norm(after - before) <= bound * torch.linalg.norm(before)
    for name, layer in layers.items():  # Llama's norms compute in float32, and hide what is smaller
        change = (layer.B.double() @ layer.A.double()).detach() - updates[name]
        assert torch.linalg.norm(change) <= bound * torch.linalg.norm(updates[name])
    assert torch.linalg.norm(before - plain) > 0.01 * torch.linalg.norm(before), "the update is too small to show this"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*float16:UserWarning")
@pytest.mark.parametrize("base", ["bnb4", "bnb8"])
def test_the_function_stays_on_quantised_bases(base: str) -> None:
    model = adapted(BASES[base](), target_modules=["q_proj", "v_proj", "down_proj"])
    before = logits(model)
    resize_(find_layers(model), random_plans(model))
    # int8 rounds activations, which a last bit may tip over
    assert (logits(model) - before).abs().max() <= (1e-2 if base == "bnb8" else 1e-6) * before.abs().max()


@pytest.mark.parametrize("form", ["linear", "conv1d", "embedding", "dora"])
def test_gradients_are_those_of_the_new_basis(form: str) -> None:
    """The turned ``.grad`` against autograd's, taken after the turn."""
    model = FORMS[form]().double().eval()
    layers = find_layers(model)
    model(**token_batch()).loss.backward()
    resize_(layers, random_plans(model))
    weights = [weight for layer in layers.values() for weight in (layer.A, layer.B)]
    for weight, expected in zip(weights, torch.autograd.grad(model(**token_batch()).loss, weights), strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-12)


def turned_gradients(basis: Basis, steps: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """By autograd: those of the weights in the new basis, for the same loss."""
    found = []
    for step in steps:
        turned = {}
        for part, gradient in step.items():
            new = torch.zeros_like(gradient).requires_grad_()
            old = basis.inverse @ new if part == "A" else new @ basis.matrix
            turned[part] = torch.autograd.grad((old * gradient).sum(), new)[0]
        found.append(turned)
    return found


@pytest.mark.parametrize("name", ["SGD, momentum", "SGD, nesterov", "Adam", "Muon"])
def test_first_moments_are_those_of_an_optimiser_that_trained_in_the_new_basis(name: str) -> None:
    makes: dict[str, Any] = {
        **ALL,
        "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, dampening=0),
    }
    layers, layer = layer_for(name)
    basis = random_basis(layer.rank, 5)
    parts = {"A": layer.A, "B": layer.B}
    twin = {part: nn.Parameter(weight.detach().clone()) for part, weight in parts.items()}
    optimizer, other = makes[name](list(parts.values())), makes[name](list(twin.values()))
    steps = [{part: draw[i] for part, draw in gradients(parts).items()} for i in range(STEPS)]
    take_steps(optimizer, parts, steps)
    take_steps(other, twin, turned_gradients(basis, steps))
    resize_(layers, {layer.name: keep_all(layer.rank, basis)}, optimizer)
    key = "exp_avg" if name == "Adam" else "momentum_buffer"
    for part, weight in parts.items():
        torch.testing.assert_close(optimizer.state[weight][key], other.state[twin[part]][key], rtol=1e-12, atol=1e-14)


def test_sgd_with_momentum_goes_on_in_the_new_basis() -> None:
    """Its steps from the same weights, with the same further gradients, are those of the twin."""
    layers, layer = layer_for("SGD, momentum")
    basis, parts = random_basis(4, 6), {"A": layer.A, "B": layer.B}
    optimizer = ALL["SGD, momentum"](list(parts.values()))
    steps = [{part: draw[i] for part, draw in gradients(parts).items()} for i in range(STEPS)]
    take_steps(optimizer, parts, steps)
    resize_(layers, {layer.name: keep_all(4, basis)}, optimizer)
    twin = {part: nn.Parameter(weight.detach().clone()) for part, weight in parts.items()}
    start = {part: weight.detach().clone() for part, weight in twin.items()}
    other = ALL["SGD, momentum"](list(twin.values()))
    take_steps(other, twin, turned_gradients(basis, steps))
    for part, weight in twin.items():
        weight.data.copy_(start[part])
    further = steps[::-1]
    take_steps(optimizer, parts, further)
    take_steps(other, twin, further)
    for part, weight in parts.items():
        torch.testing.assert_close(weight, twin[part], rtol=1e-12, atol=1e-13)


def test_second_moments_turn_by_squares() -> None:
    layers, layer = layer_for("Adam")
    basis, parts = random_basis(4, 7), {"A": layer.A, "B": layer.B}
    optimizer = torch.optim.Adam(list(parts.values()), amsgrad=True)
    take_steps(optimizer, parts, [{part: draw[0] for part, draw in gradients(parts).items()}])
    before = {part: dense(optimizer, weight) for part, weight in parts.items()}
    resize_(layers, {layer.name: keep_all(4, basis)}, optimizer)
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        A, B = (optimizer.state[parts[part]][key] for part in "AB")
        for i in range(4):
            expected = sum(float(basis.inverse[j, i]) ** 2 * before["A"][key][j] for j in range(4))
            torch.testing.assert_close(A[i], expected, rtol=1e-12, atol=0)
            expected = sum(float(basis.matrix[i, j]) ** 2 * before["B"][key][:, j] for j in range(4))
            torch.testing.assert_close(B[:, i], expected, rtol=1e-12, atol=0)


FIRST = ("exp_avg", "momentum_buffer", "grad_avg", "ax", "z", "state1", "state1.0", "state1.1")
"""Entries that change their sign with their rank."""
ONLY_SQUARES = ("adagrad", "rmsprop")
ANEW = {"Rprop", "Rprop, small steps", "own"}


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles for each new shape


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED])
def test_a_signed_permutation_is_a_reindexing_with_signs(name: str) -> None:
    """The twin is the resize that there was before there were bases. Then both train on without a fault."""
    order, signs = (2, 0, 3, 1), (-1, 1, 1, -1)
    layers, layer = layer_for(name)
    optimizer = ALL[name]([layer.A, layer.B])
    parts = {"A": layer.A, "B": layer.B}
    steps = [{part: draw[i] for part, draw in gradients(parts).items()} for i in range(STEPS)]
    take_steps(optimizer, parts, steps)
    before = {part: dense(optimizer, weight) for part, weight in parts.items()}
    factored = {
        part: {key: value.clone() for key, value in optimizer.state[weight].items() if key in optimizer_state.FACTORED}
        for part, weight in parts.items()
    }
    weights = {part: weight.detach().clone() for part, weight in parts.items()}
    resize_(layers, {layer.name: keep_all(4, signed_permutation(order, signs))}, optimizer)
    index = torch.tensor(order)
    for part, axis in AXES.items():
        sign = torch.tensor(signs).to(weights[part]).unsqueeze(1 - axis)
        assert torch.equal(parts[part], weights[part].index_select(axis, index) * sign)
        after = dense(optimizer, parts[part])
        assert after.keys() == before[part].keys()
        for key, value in after.items():
            old = before[part][key]
            if name in ANEW:
                start = 1e-3 if name == "Rprop, small steps" else 1e-2
                assert torch.equal(value, torch.full_like(value, start if key == "step_size" else 0.0))
                continue
            first = key in FIRST and not (key in ("state1", "state1.0") and any(kind in name for kind in ONLY_SQUARES))
            expected = old.index_select(axis, index) * (sign if first else 1)
            error = 0.15 if "4bit" in name else 0.05 if name in QUANTISED else 1e-7
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=error * float(old.abs().max()))
        for key, value in factored[part].items():
            has_ranks = key in (("row_var", "exp_avg_sq_row") if part == "A" else ("col_var", "exp_avg_sq_col"))
            rank_axis = list(value.shape).index(4) if has_ranks else 0
            expected = value.index_select(rank_axis, index) if has_ranks else value
            torch.testing.assert_close(optimizer.state[parts[part]][key], expected, rtol=1e-6, atol=0)
    take_steps(optimizer, parts, steps)
    assert all(weight.isfinite().all() for weight in parts.values())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED])
def test_training_goes_on_after_any_turn(name: str) -> None:
    """No NaN, as from a variance that a turn makes negative, and moments of squares stay ≥ 0."""
    layers, layer = layer_for(name)
    optimizer = ALL[name]([layer.A, layer.B])
    parts = {"A": layer.A, "B": layer.B}
    same = {part: torch.ones_like(weight) for part, weight in parts.items()}  # all gradients point one way
    take_steps(optimizer, parts, [same] * STEPS)
    resize_(layers, {layer.name: keep_all(4, random_basis(4, 8))}, optimizer)
    take_steps(optimizer, parts, [same] * STEPS)
    assert all(weight.isfinite().all() for weight in parts.values())


def test_the_variance_of_centred_rmsprop_turns_as_squares_do() -> None:
    layers, layer = layer_for("RMSprop, centered")
    optimizer = ALL["RMSprop, centered"]([layer.A, layer.B])
    parts, basis = {"A": layer.A, "B": layer.B}, random_basis(4, 9)
    take_steps(optimizer, parts, [{part: draw[0] for part, draw in gradients(parts).items()}])
    square, mean = (optimizer.state[layer.A][key].clone() for key in ("square_avg", "grad_avg"))
    resize_(layers, {layer.name: keep_all(4, basis)}, optimizer)
    now = optimizer.state[layer.A]
    variance = basis.inverse.T.square() @ (square - mean.square())
    torch.testing.assert_close(now["square_avg"] - now["grad_avg"].square(), variance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_adafactors_factors_change_together(kind: str) -> None:
    """The estimate of a second moment, row × column / mean, turns as a second moment does, up to Adafactor's ε."""
    layers, layer = layer_for("Adam")
    parts, basis = {"A": layer.A, "B": layer.B}, random_basis(4, 10)
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adafactor(list(parts.values()), lr=1e-2)
        if kind == "torch"
        else Adafactor(list(parts.values()), lr=1e-2, relative_step=False)
    )
    keys = ("row_var", "col_var") if kind == "torch" else ("exp_avg_sq_row", "exp_avg_sq_col")
    take_steps(optimizer, parts, [{part: draw[0] for part, draw in gradients(parts).items()}])

    def estimate(weight: nn.Parameter) -> Tensor:
        row, column = (optimizer.state[weight][key].flatten() for key in keys)
        return row[:, None] * column / row.mean()

    before = {part: estimate(weight) for part, weight in parts.items()}
    resize_(layers, {layer.name: keep_all(4, basis)}, optimizer)
    for (part, weight), turn in zip(parts.items(), (basis.turn(0), basis.turn(1)), strict=True):
        torch.testing.assert_close(
            estimate(weight), turn_ranks(before[part], turn.square, AXES[part]), rtol=1e-6, atol=0
        )
        row, column = (optimizer.state[weight][key] for key in keys)
        torch.testing.assert_close(row.mean(), column.mean(), rtol=1e-6, atol=0)


def test_what_begins_anew_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_state, "_logged", set())
    with caplog.at_level(logging.INFO, "lorank"):
        for name in ("own", "Rprop", "AdamW"):
            for _ in range(2):
                layers, layer = layer_for(name)
                optimizer = ALL[name]([layer.A, layer.B])
                parts = {"A": layer.A, "B": layer.B}
                take_steps(optimizer, parts, [{part: torch.ones_like(weight) for part, weight in parts.items()}])
                resize_(layers, {layer.name: keep_all(4, random_basis(4))}, optimizer)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    for kind, key in (("OwnAdam", "'m'"), ("OwnAdam", "'v'"), ("Rprop", "'prev'"), ("Rprop", "'step_size'")):
        assert sum(kind in line and key in line for line in lines) == 1, lines


def test_eight_bit_moments_turn() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = adapted(tiny_llama(1, hidden_size=1024, intermediate_size=8), target_modules=["q_proj"])
    optimizer = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-3)
    layers = find_layers(model)
    (layer,) = layers.values()
    basis = random_basis(4, 11, largest=3)
    train_step(model, optimizer, token_batch())
    assert optimizer.state[layer.A]["state1"].dtype == torch.uint8
    before = {part: dense(optimizer, weight) for part, weight in (("A", layer.A), ("B", layer.B))}
    resize_(layers, {layer.name: keep_all(4, basis)}, optimizer)
    for part, weight, turn in (("A", layer.A, basis.turn(0)), ("B", layer.B, basis.turn(1))):
        for key, matrix in (("state1.0", turn.gradient), ("state2.0", turn.square)):
            expected = turn_ranks(before[part][key], matrix, AXES[part])
            found = dense(optimizer, weight)[key]
            assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def trained(module: str) -> tuple[AdapterLayers, torch.optim.Optimizer]:
    """Layers with gradients and moments."""
    model = adapted(tiny_llama(1), target_modules=[module, "v_proj"])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train_step(model, optimizer, token_batch())
    return find_layers(model), optimizer


@settings(max_examples=15)
@given(
    keep=st.lists(st.integers(0, 3), unique=True, max_size=4),
    add=st.integers(0, 3),
    seed=st.integers(0, 100),
    with_vectors=st.booleans(),
    embedding=st.booleans(),
)
def test_all_at_once_is_one_after_another(keep, add: int, seed: int, with_vectors: bool, embedding: bool) -> None:
    """Weights, gradients and moments, bitwise."""
    (once, optimizer), (twice, other) = (trained("embed_tokens" if embedding else "q_proj") for _ in range(2))
    name = next(iter(once))
    width = once[name].d_out if embedding else once[name].d_in
    vectors = NewVectors(torch.randn(3, width, generator=torch.Generator().manual_seed(seed))) if with_vectors else None
    basis = random_basis(4, seed)
    resize_(once, {name: LayerPlan(tuple(keep), add, basis=basis, vectors=vectors)}, optimizer, seed=seed)
    resize_(twice, {name: keep_all(4, basis)}, other, seed=seed)
    resize_(twice, {name: LayerPlan(tuple(keep))}, other, seed=seed)
    resize_(twice, {name: LayerPlan(tuple(range(len(keep))), add, vectors=vectors)}, other, seed=seed)
    for one, two in ((once[name].A, twice[name].A), (once[name].B, twice[name].B)):
        assert torch.equal(one, two)
        assert torch.equal(one.grad, two.grad)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[two][key]), key
    if with_vectors and add:
        assert vectors is not None
        new = once[name].B.T[len(keep) :] if embedding else once[name].A[len(keep) :]
        zero = once[name].A[len(keep) :] if embedding else once[name].B[:, len(keep) :]
        assert torch.equal(new, vectors.values[:add])
        assert not zero.any()


def test_rank_zero_and_rank_one_turn() -> None:
    model = adapted(tiny_llama()).double()
    layers = find_layers(model)
    resize_(layers, {Q: LayerPlan(())})
    empty = torch.zeros(0, 0, dtype=torch.float64)
    other = list(layers)[3]
    resize_(layers, {Q: LayerPlan((), basis=Basis(empty, empty)), other: LayerPlan((0,))})
    before = logits(model)
    resize_(
        layers,
        {Q: LayerPlan((), basis=Basis(empty, empty)), other: LayerPlan((0,), basis=basis_of(torch.tensor([[-3.0]])))},
    )
    assert layers.ranks[Q] == 0
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)


class TestErrors:
    def refused(self, layers: Any, plan: LayerPlan, message: str, optimizer: Any = None, name: str = Q) -> None:
        """Nothing has changed, in this layer and in the one before it."""
        first = next(iter(layers))
        before = {key: (layer.A.detach().clone(), layer.B.detach().clone()) for key, layer in layers.items()}
        with pytest.raises(PlanError, match=message):
            resize_(layers, {first: LayerPlan((0,)), name: plan} if first != name else {name: plan}, optimizer)
        for key, layer in layers.items():
            assert torch.equal(before[key][0], layer.A)
            assert torch.equal(before[key][1], layer.B)

    def test_wrong_sizes(self) -> None:
        layers, name = find_layers(adapted(tiny_llama())), "model.layers.1.self_attn.q_proj"
        self.refused(layers, LayerPlan((0,), basis=random_basis(3)), r"has 4 ranks; .* shapes \(3, 3\)", name=name)
        basis = Basis(torch.eye(4).double()[:, :3], torch.eye(4).double())
        self.refused(layers, LayerPlan((0,), basis=basis), r"shapes \(4, 3\) and \(4, 4\)", name=name)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value: float) -> None:
        layers, basis = find_layers(adapted(tiny_llama())), random_basis(4)
        basis.inverse[1, 2] = value
        self.refused(layers, LayerPlan((0,), basis=basis), "NaN or infinite entries. Training may have diverged")
        vectors = NewVectors(torch.full((1, 32), value))
        self.refused(layers, LayerPlan((0,), 1, vectors=vectors), "first values .* NaN or infinite")

    @pytest.mark.parametrize("inverse", [torch.eye(4), torch.zeros(4, 4)], ids=["identity", "zero"])
    def test_another_matrix_than_the_inverse(self, inverse: Tensor) -> None:
        layers = find_layers(adapted(tiny_llama()))
        basis = Basis(random_basis(4).matrix, inverse.double())
        self.refused(layers, LayerPlan((0,), basis=basis), r"Basis\(M, torch.linalg.inv\(M\)\)")

    def test_vectors_of_another_shape(self) -> None:
        layers = find_layers(adapted(tiny_llama()))
        for shape in ((1, 32), (2, 31), (32,)):
            plan = LayerPlan((0,), 2, vectors=NewVectors(torch.zeros(shape)))
            self.refused(layers, plan, r"expected \(2, 32\)")

    def test_gates(self) -> None:
        _, layers, _ = gated()
        self.refused(layers, LayerPlan((0,), basis=random_basis(4)), "with gates.*fold gates")

    def test_heads(self) -> None:
        _, layers, optimizer = in_heads()
        layer = layers[Q]
        plan = LayerPlan(tuple(range(layer.rank)), head_ranks=layer.head_ranks, basis=random_basis(layer.rank))
        with pytest.raises(PlanError, match=r"in per-head form.*merge heads"):
            resize_(layers, {Q: plan}, optimizer)


def test_plans_have_equal_texts_if_and_only_if_their_bits_are_equal() -> None:
    """Processes compare the texts of their plans."""
    one = random_basis(4)
    same = Basis(one.matrix.clone(), one.inverse.clone())
    other = Basis(one.matrix.clone(), one.inverse.clone())
    other.inverse[2, 3] = torch.nextafter(other.inverse[2, 3], torch.tensor(9.0).double())
    assert repr(keep_all(4, one)) == repr(keep_all(4, same))
    assert keep_all(4, one) == keep_all(4, same)
    assert hash(one) == hash(same)
    assert repr(keep_all(4, one)) != repr(keep_all(4, other))
    assert one != other
    values = torch.randn(2, 3)
    changed = values.clone()
    changed[1, 1] = torch.nextafter(changed[1, 1], torch.tensor(9.0))
    assert repr(NewVectors(values)) == repr(NewVectors(values.clone()))
    assert NewVectors(values) == NewVectors(values.clone())
    assert NewVectors(values) != NewVectors(changed)
    assert repr(LayerPlan((), 1, vectors=NewVectors(values))) != repr(LayerPlan((), 1, vectors=NewVectors(changed)))


def test_the_trainers_optimisers_are_among_them() -> None:
    pytest.importorskip("bitsandbytes")
    assert {"optim=adafactor", "optim=adamw_torch_8bit", "optim=paged_ademamix_8bit"} <= OF_THE_TRAINER.keys()
