"""What the exact engine skips, and when it notices that it must not."""

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification

from lorank.lora import find_layers
from lorank.scoring import ablation_scores
from lorank.scoring.ablation_variants import IncompatibleError
from lorank.scoring.prefix_cache.block_tracing import trace_blocks
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch


def run_counter(modules, counts: list[int]) -> None:
    for module in modules:
        module.register_forward_pre_hook(lambda _m, args: counts.append(len(args[0])))


def test_far_fewer_blocks_run_than_in_the_naive_engine() -> None:
    """With L blocks, a variant of block l runs L − l of them: (L + 1) / 2L of all, here 0.58, and a few more."""
    model = adapted(tiny_llama(6), r=3, target_modules=["k_proj", "up_proj"])
    layers, batch = find_layers(model), token_batch()
    rows: list[int] = []
    run_counter([block.mlp for block in model.get_base_model().model.layers], rows)
    ablation_scores(model, layers, batch, engine="reference")
    naive = sum(rows)
    assert naive == (2 * layers.total_rank + 1) * 6 * 4
    rows.clear()
    exact = ablation_scores(model, layers, batch, max_rows=4)
    assert exact.engine == "exact"
    assert sum(rows) < 0.67 * naive
    assert set(rows) == {4}
    rows.clear()
    ablation_scores(model, layers, batch, max_rows=12)
    assert sum(rows) < 0.67 * naive
    assert len(rows) < 0.35 * naive / 4, "variants share forwards"


def test_only_labelled_positions_get_logits() -> None:
    model = adapted(tiny_llama(), r=1)
    batch = token_batch(4, 10)
    batch["labels"][:, :-3] = -100
    shapes: list[tuple[int, ...]] = []
    model.get_base_model().lm_head.register_forward_hook(lambda _m, _a, out: shapes.append(tuple(out.shape[:-1])))
    ablation_scores(model, find_layers(model), batch, max_rows=4)
    whole = [shape for shape in shapes if shape == (4, 10)]
    assert len(whole) == 2  # the forward that is watched, and the plain one that the engine is compared with
    assert set(shapes) - set(whole) == {(1, 4 * 3)}


def trace(model, batch, head=None):
    layers = find_layers(model)
    with torch.no_grad(), trace_blocks(model, layers, len(batch["labels"]), head) as seen:
        model(**batch)
    return layers, seen()


def test_blocks_are_found_by_watching() -> None:
    model = adapted(tiny_llama(3), target_modules=["embed_tokens", "v_proj", "lm_head"])
    base = model.get_base_model()
    layers, seen = trace(model.eval(), token_batch(), base.get_output_embeddings())
    assert [block.module for block in seen.blocks] == list(base.model.layers)
    assert [block.last for block in seen.blocks] == [False, False, True]
    assert list(seen.start.values()) == [0, 0, 1, 2, 3]
    assert seen.per_sample == {name for name in layers if "v_proj" in name}  # the head sees positions, not samples
    assert (seen.head, seen.tokens, seen.dtypes) == (True, 10, {torch.float32})


def test_heads_and_embeddings_of_other_models() -> None:
    model = adapted(tiny_bert(), target_modules=["value", "classifier"])
    layers, seen = trace(model.eval(), class_batch())
    assert list(seen.start.values()) == [0, 1, 2]
    assert seen.per_sample == set(layers)
    model = adapted(tiny_gpt2(), target_modules=["wpe", "c_attn"], fan_in_fan_out=True)
    _, seen = trace(model.eval(), token_batch())
    assert list(seen.start.values()) == [0, 0, 1]


class Parallel(nn.Module):
    """Members that do not feed each other."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.peft_config = {}

    def forward(self, x):
        return sum(member(x) for member in self.members)


class Twice(Parallel):
    def forward(self, x):
        for member in (*self.members, *self.members):
            x = member(x)
        return x


class Backwards(Parallel):
    def forward(self, x):
        for member in reversed(self.members):
            x = member(x)
        return x


class Added(Parallel):
    """Something is added between the members."""

    def forward(self, x):
        for member in self.members:
            x = member(x) + 1
        return x


@pytest.mark.parametrize("kind", [Parallel, Twice, Backwards, Added])
def test_modules_that_are_no_chain(kind) -> None:
    model = kind()
    with trace_blocks(model, {}, 2, None) as seen:
        model(torch.ones(2, 3, 4))
    with pytest.raises(IncompatibleError, match="no chain of blocks"):
        seen()


def test_without_a_chain_the_reference_runs(caplog) -> None:
    """ALBERT runs one block again and again."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64,
        hidden_size=24,
        embedding_size=12,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    model = adapted(AlbertForSequenceClassification(config), r=1, target_modules=["query"])
    layers = find_layers(model)
    reference = ablation_scores(model, layers, class_batch(), engine="reference")
    result = ablation_scores(model, layers, class_batch())
    assert result.engine == "reference"
    assert "no chain of blocks" in result.notice
    # Runs of other tests may be garbage-collected here, and warn that they ended early.
    assert caplog.messages.count(result.notice) == 1
    assert all(torch.equal(result.scores[name], reference.scores[name]) for name in layers)


def test_a_side_path_around_the_blocks_is_noticed() -> None:
    """What a skipped block gives to others than the next block is lost: a plain forward shows it."""
    model = adapted(tiny_llama(3), r=1)
    inner = model.get_base_model().model
    kept = []
    inner.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out))
    inner.norm.register_forward_pre_hook(lambda _m, args: (args[0] + kept.pop(),))
    layers = find_layers(model)
    result = ablation_scores(model, layers, token_batch())
    assert result.engine == "reference"
    assert "but a plain forward pass gives" in result.notice


def test_blocks_that_write_into_their_input() -> None:
    """A carried hidden state is used again, whatever a block does with it."""
    model = adapted(tiny_llama(3), r=1)
    for block in model.get_base_model().model.layers:
        block.register_forward_pre_hook(lambda _m, args: (args[0].mul_(1.1),))
    layers = find_layers(model)
    reference = ablation_scores(model, layers, token_batch(), engine="reference")
    exact = ablation_scores(model, layers, token_batch())
    assert exact.engine == "exact"
    for name in layers:
        torch.testing.assert_close(exact.scores[name], reference.scores[name], rtol=0, atol=1e-5)
