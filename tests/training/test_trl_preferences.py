"""TRL's DPO, KTO and reward trainers: ranks move, and scores and starts are those of the trainer's own loss.

The reference model of DPO and KTO is the trained model with its adapter switched off, or with a frozen copy of the
adapter that it began with. A score that let a rank's gate reach the reference would be of another loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import lorank
from lorank.lora import AdapterLayers
from lorank.scoring import ablation_scores
from lorank.scoring.weight_gradient import weight_gradients
from tests.models import VOCABULARY, adapted, tiny_llama
from tests.training.test_trainer_callback import word_tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL, about a tiny model without a template
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
STEPS = 6
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}
METHODS: dict[str, Callable[[], lorank.Allocator]] = {
    "alora": lambda: lorank.ALoRA(k1=2, k2=1, rounds=2, unit="steps", per_round=4),
    "ard": lambda: lorank.ARDLoRA(alpha_lr=0.1, resize_every=1, hold=1, budget=9),
    "balanced": lambda: lorank.BalancedLoRA(wide=2, cuts=2, until=0.6),
}


def pairs() -> Any:
    from datasets import Dataset

    def words(start: int, step: int) -> str:
        return " ".join(f"w{(start + step * i) % 60}" for i in range(5))

    return Dataset.from_list(
        [{"prompt": words(i, 1), "chosen": f" {words(i, 2)}", "rejected": f" {words(i, 7)}"} for i in range(16)]
    )


def reward_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def trainer_of(kind: str, method: str, folder: Path) -> tuple[Any, lorank.RankCallback]:
    rows = pairs()
    callback = lorank.RankCallback(
        METHODS[method](),
        loss_fn=lambda model, batch: trainer.compute_loss(model, dict(batch)),
        validation_batch=lambda: trainer.train_dataset,
        samples=4,
    )
    common = {"train_dataset": rows, "processing_class": word_tokenizer(), "callbacks": [callback]}
    config = LoraConfig(**LORA, task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    if kind == "reward":
        both = rows.map(lambda row: {key: row["prompt"] + row[key] for key in ("chosen", "rejected")})
        common["train_dataset"] = both.remove_columns("prompt")
        trainer = trl.RewardTrainer(
            reward_model(), trl.RewardConfig(str(folder), **ARGUMENTS), peft_config=config, **common
        )
    elif kind == "kto":
        arguments = trl.KTOConfig(str(folder), **ARGUMENTS)
        trainer = trl.KTOTrainer(tiny_llama(), args=arguments, peft_config=config, **common)
    elif kind == "dpo":
        trainer = trl.DPOTrainer(
            tiny_llama(), args=trl.DPOConfig(str(folder), **ARGUMENTS), peft_config=config, **common
        )
    else:  # an adapter that was trained before, which TRL copies as the reference
        model = adapted(tiny_llama(), **LORA, task_type="CAUSAL_LM")
        trainer = trl.DPOTrainer(model, args=trl.DPOConfig(str(folder), **ARGUMENTS), **common)
    return trainer, callback


def naive_scores(model: nn.Module, layers: AdapterLayers, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """L without a rank minus L, with the rank's column of B set to zero in the live model."""
    with torch.no_grad():
        whole, scores = loss(), {}
        for name, layer in layers.items():
            scores[name] = torch.zeros(layer.rank)
            for rank in range(layer.rank):
                kept = layer.B[:, rank].clone()
                layer.B[:, rank] = 0
                scores[name][rank] = loss() - whole
                layer.B[:, rank] = kept
    return scores


def naive_gradients(layers: AdapterLayers, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """∂L/∂W of the frozen weights, by autograd."""
    weights = {name: layer.module.get_base_layer().weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    found = torch.autograd.grad(loss(), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("dpo", "alora"), ("dpo, trained adapter", "alora"), ("kto", "ard"), ("reward", "balanced")],
)
def test_ranks_move_and_scores_are_of_the_trainers_loss(kind: str, method: str, tmp_path: Path) -> None:
    trainer, callback = trainer_of(kind, method, tmp_path)
    model = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))

    def loss() -> Tensor:
        value: Tensor = trainer.compute_loss(model, dict(batch))
        return value

    def reference() -> Any:
        with torch.no_grad():
            return trainer.compute_ref_log_probs(model, dict(batch)) if kind.startswith("dpo") else ()

    before = copy.deepcopy(reference())
    trainer.train()
    ranks = callback.ranks
    assert ranks.history[0].ranks != ranks.layers.ranks
    assert len(set(ranks.layers.ranks.values())) > 1
    assert ranks.budget is None or ranks.budget.fits(ranks.layers.ranks)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if kind == "dpo":  # the model begins at its reference
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert min(losses[1:]) < losses[0]
    for one, other in zip(reference(), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    if kind == "dpo, trained adapter":  # TRL gives both adapters one LoraConfig; the trained one gets another
        assert set(lorank.find_layers(model, "ref").ranks.values()) == {4}
        assert not model.peft_config["ref"].rank_pattern
    callback.ranks.save_adapter(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(reward_model() if kind == "reward" else tiny_llama(), tmp_path / "adapter")
    ids = {"input_ids": torch.arange(3, 13).unsqueeze(0)}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**ids).logits, model.eval()(**ids).logits, rtol=0, atol=1e-5)

    model.eval()
    expected = naive_scores(model, ranks.layers, loss)
    own_loss = {"loss_fn": lambda model, rows: trainer.compute_loss(model, dict(rows))}
    found = ablation_scores(model, ranks.layers, dict(batch), terms="without", engine="reference", **own_loss)
    assert max(float(scores.abs().max()) for scores in expected.values() if len(scores)) > 1e-4
    for name, scores in expected.items():
        torch.testing.assert_close(found.scores[name].float(), scores, rtol=1e-3, atol=1e-6)
    gradients = naive_gradients(ranks.layers, loss)
    starts = weight_gradients(model, ranks.layers, [dict(batch)], 3, **own_loss)
    for name, gradient in gradients.items():
        values = torch.linalg.svdvals(gradient.double())[:3]
        torch.testing.assert_close(starts[name].values, values, rtol=1e-3, atol=1e-8)
