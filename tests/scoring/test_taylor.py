"""First-order estimates are what they claim to be: derivatives of the loss that ablation compares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorank.lora import find_layers
from lorank.scoring import ablation_scores, first_order_scores
from lorank.scoring.loss import prepare_batch
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.taylor import GatePath
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit, token_batch
from tests.models import digit_batch as digits
from tests.scoring.test_preserve_state import Interrupted, state

RANKS = {"r": 2, "rank_pattern": {"q_proj|query|c_attn": 1, "down_proj|dense|c_proj": 3}}


@pytest.fixture
def keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes Llama's norm and every language model's loss in float32."""

    def norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def loss(logits: Tensor, labels: Tensor, **_: object) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    for make in (tiny_llama, tiny_gpt2):
        monkeypatch.setattr(type(make()), "loss_function", property(lambda self: loss))


def few_labels() -> dict[str, Tensor]:
    """Rows of unequal length, each with its own number of labels, one with none."""
    batch = token_batch(6, padded=True)
    for row in range(6):
        batch["labels"][row, : 9 - row] = -100
    return batch


def gradient_at(model, batch, t: float, **options):
    layers = find_layers(model)
    options = {"loss_fn": None, "max_rows": None, "share": None, **options}
    with preserve_state(model, layers):
        path = GatePath(model, layers, prepare_batch(model, batch, needs_labels=True), **options)
        return path.at(t), path


def flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(scores.values()))


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("make", "batch", "lora"),
    [
        (tiny_llama, few_labels, {}),
        (tiny_bert, lambda: class_batch(padded=True), {"task_type": "SEQ_CLS"}),
        (tiny_gpt2, few_labels, {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True}),
    ],
    ids=["llama", "bert", "gpt2"],
)
def test_against_finite_differences_of_the_models_own_loss(make, batch, lora, t) -> None:
    model = adapted(make(), **RANKS, **lora).double().eval()
    layers, batch = find_layers(model), batch()
    found, _ = gradient_at(model, batch, t)
    step = 1e-5
    expected: dict[str, list[float]] = {name: [] for name in layers}

    @torch.no_grad()
    def loss() -> float:
        return float(model(**batch).loss)

    for layer in layers.values():
        layer.gate = torch.full((layer.rank,), t, dtype=torch.float64)
    assert found.loss == pytest.approx(loss(), rel=1e-12)
    for name, layer in layers.items():
        for k in range(layer.rank):
            around = []
            for sign in (1, -1):
                layer.gate = torch.full((layer.rank,), t, dtype=torch.float64)
                layer.gate[k] += sign * step
                around.append(loss())
            layer.gate = torch.full((layer.rank,), t, dtype=torch.float64)
            expected[name].append((around[0] - around[1]) / (2 * step))
    differences = torch.cat([torch.tensor(values, dtype=torch.float64) for values in expected.values()])
    torch.testing.assert_close(flat(found.gradient), differences, rtol=1e-6, atol=1e-8)
    assert differences.abs().max() > 1e-3, "all gradients are tiny: this test would pass with any"


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("max_rows", [1, 2, 4])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_parts_add_up_to_the_gradient_of_the_whole_batch(make, max_rows) -> None:
    """Parts have unequal numbers of labels, so a mean of their means would be another one."""
    model = adapted(make(), **RANKS).double()
    batch = few_labels() if make is tiny_llama else class_batch(6, padded=True)
    whole, _ = gradient_at(model, batch, 1.0)
    in_parts, path = gradient_at(model, batch, 1.0, max_rows=max_rows)
    assert len(path._parts) >= 6 // max_rows - 1
    assert in_parts.loss == pytest.approx(whole.loss, rel=1e-12)
    torch.testing.assert_close(flat(in_parts.gradient), flat(whole.gradient), rtol=1e-10, atol=1e-14)


def test_a_gate_that_a_layer_already_has_belongs_to_the_model() -> None:
    gated, folded = (adapted(tiny_llama(), r=2).double() for _ in range(2))
    gates = torch.tensor([0.5, -2.0], dtype=torch.float64)
    for layer in find_layers(gated).values():
        layer.gate = gates
    with torch.no_grad():
        for layer in find_layers(folded).values():
            layer.B.mul_(gates)
    a, b = (first_order_scores(model, find_layers(model), token_batch()) for model in (gated, folded))
    torch.testing.assert_close(flat(a.scores), flat(b.scores), rtol=1e-6, atol=1e-9)
    assert all(layer.gate is gates for layer in find_layers(gated).values())


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("terms", ["both", "without", "alone"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_vit], ids=["llama", "bert", "vit"])
def test_for_small_updates_the_estimate_is_the_score(make, terms) -> None:
    """What is left is of second order: an update a tenth as large has errors of a hundredth."""
    batch = {tiny_llama: token_batch, tiny_bert: class_batch, tiny_vit: digits}[make]()
    errors = []
    for size in (0.1, 0.01):
        model = adapted(make(), r=2).double()
        layers = find_layers(model)
        with torch.no_grad():
            for layer in layers.values():
                layer.B.mul_(size)
        exact = ablation_scores(model, layers, batch, terms=terms, engine="reference", loss_fn=float64_loss)
        estimate = first_order_scores(model, layers, batch, terms=terms, loss_fn=float64_loss)
        assert (estimate.engine, estimate.evaluations) == ("gradients", 0)
        assert estimate.baseline == pytest.approx(exact.baseline, rel=1e-12)
        spread = flat(exact.scores).std()
        errors.append(float((flat(estimate.scores) - flat(exact.scores)).abs().max()))
        assert errors[-1] < 0.3 * spread
    assert errors[1] < errors[0] / 50


def float64_loss(model, batch):
    output = model(**batch)
    labels = batch["labels"]
    logits = output.logits
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits.double(), labels)


def test_a_loss_of_ones_own_runs_whole_and_says_so_if_that_is_large() -> None:
    model = adapted(tiny_llama(), r=1)
    layers = find_layers(model)
    rows = []

    def loss_fn(model, batch):
        rows.append(len(batch["input_ids"]))
        return model(**batch).loss

    small = first_order_scores(model, layers, token_batch(), loss_fn=loss_fn)
    plain = first_order_scores(model, layers, token_batch())
    assert small.notice is None
    torch.testing.assert_close(flat(small.scores), flat(plain.scores), rtol=0, atol=1e-6)
    large = first_order_scores(model, layers, token_batch(), loss_fn=loss_fn, max_rows=2)
    assert "cannot be split, because loss_fn" in large.notice
    assert rows == [4, 4, 4, 4]


def test_a_smoothed_loss_is_the_models_own(monkeypatch) -> None:
    model = adapted(tiny_llama(), r=2)
    layers = find_layers(model)

    def smoothed(logits, labels, **_):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3)

    plain = first_order_scores(model, layers, token_batch())
    monkeypatch.setattr(type(model.get_base_model()), "loss_function", property(lambda self: smoothed))
    own = first_order_scores(model, layers, token_batch())
    expected = first_order_scores(
        model, layers, token_batch(), loss_fn=lambda m, b: smoothed(m(**{**b, "labels": None}).logits, b["labels"])
    )
    torch.testing.assert_close(flat(own.scores), flat(expected.scores), rtol=0, atol=1e-6)
    assert (flat(own.scores) - flat(plain.scores)).abs().max() > 1e-3


def test_ranks_that_add_nothing_score_as_in_ablation() -> None:
    model = adapted(tiny_llama(), random_B=False)
    layers = find_layers(model)
    torch.testing.assert_close(
        flat(first_order_scores(model, layers, token_batch()).scores),
        flat(ablation_scores(model, layers, token_batch()).scores),
        rtol=0,
        atol=1e-6,
    )


def test_a_model_in_16_bits() -> None:
    model = adapted(tiny_llama(), r=2)
    layers = find_layers(model)
    exact = flat(first_order_scores(model, layers, token_batch()).scores)
    half = adapted(tiny_llama(), r=2).to(torch.bfloat16)
    rounded = flat(first_order_scores(half, find_layers(half), token_batch()).scores)
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.99


@pytest.fixture
def model():
    """In training, between backward and step: gradients, a gate, some modules frozen in evaluation mode."""
    model = adapted(tiny_llama(3), r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    model.train()
    model.get_base_model().model.layers[1].eval()
    next(iter(find_layers(model).values())).gate = torch.tensor([0.5, 1.0], requires_grad=True)
    model(**token_batch()).loss.backward()
    return model


def test_everything_is_restored(model) -> None:
    layers = find_layers(model)
    before = state(model, layers)
    first_order_scores(model, layers, token_batch(), max_rows=2)
    assert state(model, layers) == before


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6])
def test_everything_is_restored_after_an_exception(model, call) -> None:
    """Raised in the watched forward, in its comparison, and in the first or a later pass."""
    layers = find_layers(model)
    calls = 0

    def interrupt(_module, _args) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise Interrupted

    model.get_base_model().model.layers[2].mlp.register_forward_pre_hook(interrupt)
    before = state(model, layers)
    with pytest.raises(Interrupted):
        first_order_scores(model, layers, token_batch(), max_rows=2)
    assert state(model, layers) == before


@pytest.mark.parametrize("option", [{"terms": "all"}, {"max_rows": 0}])
def test_unknown_options(model, option) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*; expected"):
        first_order_scores(model, find_layers(model), token_batch(), **option)
