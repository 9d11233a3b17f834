"""The exact engine gives the naive engine's scores, on every kind of model and batch that it takes."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorank.lora import LayerPlan, find_layers, resize_
from lorank.scoring import AblationResult, ablation_scores
from tests.models import VOCABULARY, adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch

RANKS = {"r": 2, "rank_pattern": {"q_proj|v_proj|query|c_attn": 1, "o_proj|down_proj|dense|c_proj": 3}}  # they differ


def padded_left() -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in token_batch(padded=True).items()}


def last_labelled() -> dict[str, Tensor]:
    batch = token_batch(padded=True)
    batch["labels"][:, :-4] = -100
    return batch


def flat(result: AblationResult) -> Tensor:
    return torch.cat(list(result.scores.values()))


def assert_same_scores(exact: AblationResult, reference: AblationResult, relative: float) -> None:
    """Scores are differences of losses, so rounding is relative to the losses."""
    assert (exact.engine, exact.notice, reference.engine) == ("exact", None, "reference")
    assert exact.scores.keys() == reference.scores.keys()
    scale = relative * abs(reference.baseline)
    torch.testing.assert_close(flat(exact), flat(reference), rtol=0, atol=scale)
    assert exact.baseline == pytest.approx(reference.baseline, abs=scale)
    assert flat(reference).std() > 100 * scale, "the scores hardly differ: this test would pass with any"


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


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("terms", ["both", "without", "alone"])
@pytest.mark.parametrize(
    ("make", "batch", "lora"),
    [
        (tiny_llama, token_batch, {}),
        (tiny_llama, padded_left, {}),
        (tiny_llama, last_labelled, {"target_modules": ["embed_tokens", "v_proj", "down_proj", "lm_head"]}),
        (tiny_bert, lambda: class_batch(padded=True), {"task_type": "SEQ_CLS"}),
        (tiny_gpt2, last_labelled, {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True}),
    ],
    ids=["llama", "llama padded left", "llama embedding and head", "bert", "gpt2"],
)
def test_exact_equals_reference_in_float64(make, batch, lora, terms) -> None:
    model = adapted(make(), **RANKS, **lora).double()
    layers = find_layers(model)
    reference = ablation_scores(model, layers, batch(), terms=terms, engine="reference")
    exact = ablation_scores(model, layers, batch(), terms=terms)
    assert_same_scores(exact, reference, 1e-12)
    assert exact.evaluations == reference.evaluations
    assert exact.evaluations == layers.total_rank * (2 if terms == "both" else 1) + (2 if terms == "alone" else 1)
    assert {name: len(scores) for name, scores in exact.scores.items()} == layers.ranks
    assert all(s.dtype == torch.float64 and s.device.type == "cpu" for s in exact.scores.values())


@pytest.mark.parametrize("max_rows", [1, 3, 5, 12])
@pytest.mark.parametrize(
    ("make", "target_modules"),
    [(tiny_llama, ["q_proj", "v_proj", "o_proj"]), (tiny_bert, ["query", "dense", "classifier"])],
    ids=["llama", "bert"],
)
def test_the_size_of_a_forward_changes_nothing(make, target_modules, max_rows) -> None:
    """Below the batch's 5 samples it runs in parts, above it several variants share a forward."""
    model = adapted(make(), **RANKS, target_modules=target_modules)
    layers = find_layers(model)
    batch = token_batch(5, padded=True) if make is tiny_llama else class_batch(5, padded=True)
    if make is tiny_llama:
        batch["labels"][:2] = -100  # with one row per part: parts without any label
    rows = []
    reference = ablation_scores(model, layers, batch, engine="reference")
    hook = model.register_forward_hook(lambda _m, _a, kw, _o: rows.append(len(kw["input_ids"])), with_kwargs=True)
    exact = ablation_scores(model, layers, batch, max_rows=max_rows)
    hook.remove()
    assert_same_scores(exact, reference, 1e-5)
    assert max(rows) <= max_rows


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    )


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GQA = {**SMALL, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("make", "batch", "target_modules"),
    [
        (lambda: LlamaForSequenceClassification(LlamaConfig(**GQA, num_labels=3)), class_batch, ["v_proj", "score"]),
        (
            lambda: RobertaForTokenClassification(RobertaConfig(**SMALL, num_labels=3)),
            lambda: {**token_batch(padded=True), "labels": token_batch(padded=True)["input_ids"] % 3},
            ["value", "classifier"],
        ),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**GQA, head_dim=6, final_logit_softcapping=2.0, sliding_window=4)),
            last_labelled,
            ["v_proj"],
        ),
        (
            lambda: OPTForCausalLM(
                OPTConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=24,
                    word_embed_proj_dim=24,
                    ffn_dim=40,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    pad_token_id=0,
                )
            ),
            padded_left,
            ["fc1"],
        ),
        (lambda: MixtralForCausalLM(MixtralConfig(**GQA, num_local_experts=4)), token_batch, ["v_proj"]),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(
                    vocab_size=VOCABULARY,
                    d_model=24,
                    d_kv=6,
                    d_ff=40,
                    num_layers=2,
                    num_heads=4,
                    decoder_start_token_id=0,
                )
            ),
            lambda: token_batch(padded=True),
            ["v", "wo"],
        ),
        (vit, lambda: {"pixel_values": torch.rand(4, 3, 16, 16), "labels": torch.arange(4) % 3}, "all-linear"),
        (lambda: tiny_llama().to(torch.bfloat16), last_labelled, ["v_proj"]),
    ],
    ids=["llama classifier", "token classes", "soft cap", "opt", "mixture", "encoder-decoder", "images", "bfloat16"],
)
def test_other_architectures(make, batch, target_modules) -> None:
    torch.manual_seed(0)
    model = adapted(make(), r=2, target_modules=target_modules)
    layers = find_layers(model)
    torch.manual_seed(1)
    inputs = batch()
    reference = ablation_scores(model, layers, inputs, engine="reference")
    assert_same_scores(ablation_scores(model, layers, inputs), reference, 1e-5)


def test_one_sample() -> None:
    """Its first axis is as long as those of tables that all samples share."""
    model = adapted(tiny_gpt2(), target_modules=["c_attn", "wpe"], fan_in_fan_out=True)
    layers, batch = find_layers(model), token_batch(1)
    reference = ablation_scores(model, layers, batch, engine="reference")
    for max_rows in (None, 1, 3):
        assert_same_scores(ablation_scores(model, layers, batch, max_rows=max_rows), reference, 1e-5)


def test_a_batch_with_a_tensor_that_all_samples_share() -> None:
    model = adapted(tiny_llama(), **RANKS)
    layers = find_layers(model)
    batch = {**token_batch(), "position_ids": torch.arange(10)[None]}
    reference = ablation_scores(model, layers, batch, engine="reference")
    assert_same_scores(ablation_scores(model, layers, batch), reference, 1e-5)


@pytest.mark.parametrize("wrap", ["add_adapter", "ddp", "accelerate", "checkpointing", "compile"])
def test_wrapped_models(wrap) -> None:
    base = tiny_llama()
    if wrap == "add_adapter":
        from peft import LoraConfig

        base.add_adapter(LoraConfig(r=2, target_modules=["v_proj", "up_proj"]))
        model = base
        for layer in find_layers(model).values():
            nn.init.normal_(layer.B, std=0.2)
    else:
        model = adapted(base, **RANKS, lora_dropout=0.5)
    layers = find_layers(model)
    reference = ablation_scores(model, layers, token_batch(), engine="reference")
    model.train()
    if wrap == "accelerate":
        model.forward = partial(model.forward)
        block = base.model.layers[1]
        block.forward = patched = partial(block.forward)
    elif wrap == "checkpointing":
        base.activation_checkpointing_enable()
    elif wrap == "compile":
        model = torch.compile(model, backend="eager")
        base.model.layers[0].compile(backend="eager")
    elif wrap == "ddp":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(model)
        finally:
            torch.distributed.destroy_process_group()
    assert_same_scores(ablation_scores(model, layers, token_batch()), reference, 1e-5)
    if wrap == "accelerate":
        assert block.forward is patched
    if wrap == "compile":
        assert base.model.layers[0]._compiled_call_impl is not None


@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_the_formula(engine) -> None:
    """IS(r) = S(M) − S(M without r) + S(M with r alone), with ranks taken away from the weights by hand."""
    model = adapted(tiny_llama(1), r=2, target_modules=["v_proj", "down_proj"]).eval()
    layers, batch = find_layers(model), token_batch()

    @torch.no_grad()
    def S(off: dict[str, list[int]]) -> float:
        saved = {name: layers[name].B.clone() for name in off}
        for name, ranks in off.items():
            layers[name].B[:, ranks] = 0
        loss = model(**batch).loss
        for name, B in saved.items():
            layers[name].B.copy_(B)
        return -float(loss)

    first, second = layers
    scores = ablation_scores(model, layers, batch, engine=engine).scores
    IS = S({}) - S({first: [1]}) + S({first: [0], second: [0, 1]})
    assert float(scores[first][1]) == pytest.approx(IS, abs=2e-6)
    IS = S({}) - S({second: [0]}) + S({second: [1], first: [0, 1]})
    assert float(scores[second][0]) == pytest.approx(IS, abs=2e-6)


@pytest.mark.parametrize("engine", ["exact", "reference"])
@pytest.mark.parametrize("terms", ["without", "alone"])
def test_a_rank_that_adds_nothing_scores_zero(engine, terms) -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    first, *_, last = layers
    with torch.no_grad():
        layers[first].B[:, 2] = 0
        layers[last].A[0] = 0
    result = ablation_scores(model, layers, token_batch(), terms=terms, engine=engine)
    zeros = [
        (name, k) for name, scores in result.scores.items() for k, score in enumerate(scores.tolist()) if not score
    ]
    assert zeros == [(first, 2), (last, 0)]


def test_ranks_that_add_nothing_need_no_forward() -> None:
    model = adapted(tiny_llama(), random_B=False)  # as at initialisation: B = 0
    layers = find_layers(model)
    result = ablation_scores(model, layers, token_batch())
    assert result.evaluations == 2  # M and the base
    torch.testing.assert_close(flat(result), torch.full((56,), -result.baseline, dtype=torch.float64))


@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_a_layer_of_rank_0_has_no_scores(engine) -> None:
    model = adapted(tiny_llama(), r=1, target_modules=["q_proj"])
    layers = find_layers(model)
    first, last = layers
    resize_(layers, {first: LayerPlan(keep=())})
    result = ablation_scores(model, layers, token_batch(), engine=engine)
    assert {name: len(scores) for name, scores in result.scores.items()} == {first: 0, last: 1}
    assert result.evaluations == 3


@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_a_gate_that_a_layer_already_has_belongs_to_the_model(engine) -> None:
    gated, folded = (adapted(tiny_llama(), r=2) for _ in range(2))
    gates = torch.tensor([0.5, 0.0])
    for layer in find_layers(gated).values():
        layer.gate = gates
    with torch.no_grad():
        for layer in find_layers(folded).values():
            layer.B.mul_(gates)
    a = ablation_scores(gated, find_layers(gated), token_batch(), engine=engine)
    b = ablation_scores(folded, find_layers(folded), token_batch(), engine="reference")
    torch.testing.assert_close(flat(a), flat(b), rtol=0, atol=1e-5)
    assert all(layer.gate is gates for layer in find_layers(gated).values())


def append(seen: list[tuple[int, int]], done: int, total: int) -> None:
    seen.append((done, total))


def test_progress_counts_to_the_end() -> None:
    model = adapted(tiny_llama(), r=1)
    layers = find_layers(model)
    for options in ({}, {"max_rows": 2}, {"engine": "reference"}):
        seen: list[tuple[int, int]] = []
        report = partial(append, seen)
        result = ablation_scores(model, layers, token_batch(), progress=report, **options)
        done = [now for now, _ in seen]
        assert done == sorted(done)
        assert seen[-1] == (result.evaluations, result.evaluations) == (29, 29)
