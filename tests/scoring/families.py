"""Tiny models of many families: how each is called, and what its batch holds.

The families differ in what the model makes of the labels: decoder inputs, one class per sample, the ends of a span, or
nothing but the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.models import VOCABULARY, tiny_llama, tiny_vit

WIDTH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
FEED_FORWARD = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SEQ2SEQ = {**TOKENS, **WIDTH, **HEADS, **FEED_FORWARD, "max_position_embeddings": 64, "decoder_start_token_id": 2}
FSMT_TOKENS = {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
IMAGES = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        make: makes the model; the weights are random.
        batch: from a number of samples to a batch with labels.
        modules: the modules to adapt.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    modules: list[str]


def tokens(rows: int, length: int = 9, *, first: int = 3, seed: int = 0) -> Tensor:
    """(rows, length) token ids."""
    return torch.randint(first, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text_to_text(rows: int) -> dict[str, Tensor]:
    """A source and a target; targets differ in length."""
    source, labels = tokens(rows), tokens(rows, 6, seed=1)
    labels[torch.arange(rows) % 2 == 1, 4:] = -100
    mask = torch.ones_like(source)
    mask[0, 7:] = 0
    return {"input_ids": source, "attention_mask": mask, "labels": labels}


def labels_of(rows: int) -> Tensor:
    return text_to_text(rows)["labels"]


def span(rows: int) -> dict[str, Tensor]:
    """A question and a passage; the answer is a span, so there is nothing under the name of labels."""
    return {
        "input_ids": tokens(rows),
        "start_positions": torch.arange(rows) % 4,
        "end_positions": torch.arange(rows) % 4 + 3,
    }


class Tuples(nn.Module):
    """A model that returns tuples, (loss, logits) with labels and (logits,) without."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = self.model(input_ids=input_ids, labels=labels, return_dict=False, use_cache=False)
        return output


class Plain(nn.Module):
    """A module of one's own: no configuration, no labels without a loss, a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.first, self.second, self.out = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        hidden = self.embed(input_ids)  # (n, T, 16)
        logits = self.out(hidden + self.second(torch.relu(self.first(hidden))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class TeacherForced(nn.Module):
    """A module of one's own whose inputs include the previous label. Without labels, it takes the inputs for labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.first, self.second, self.out = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Mapping[str, Tensor]:
        previous = (input_ids if labels is None else labels).roll(1, dims=1)
        hidden = self.embed(input_ids) + self.embed(previous)  # (n, T, 16)
        logits = self.out(hidden + self.second(torch.relu(self.first(hidden))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return seeded


def _pix2struct() -> nn.Module:
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    vision = {"hidden_size": 32, "patch_embed_hidden_size": 32, "d_ff": 48, "d_kv": 8}
    return hf.Pix2StructForConditionalGeneration(
        hf.Pix2StructConfig(
            text_config={**text, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1},
            vision_config={**vision, "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 8},
        )
    )


def _pix2struct_batch(rows: int) -> dict[str, Tensor]:
    patches = noise(rows, 8, 34)
    mask = torch.ones(rows, 8)
    mask[:, 6:] = 0  # images have fewer patches than there is room for
    patches[..., 0] = torch.arange(8) // 4 + 1  # the row and the column of each patch
    patches[..., 1] = torch.arange(8) % 4 + 1
    return {"flattened_patches": patches, "attention_mask": mask, "labels": labels_of(rows)}


def _blip() -> nn.Module:
    text = {**ENCODER, "encoder_hidden_size": 32, "bos_token_id": 0, "sep_token_id": 2, "pad_token_id": 1}
    return hf.BlipForConditionalGeneration(
        hf.BlipConfig(
            text_config={**text, "is_decoder": True},
            vision_config={**IMAGES, "num_channels": 3},
            projection_dim=32,
            image_text_hidden_size=32,
        )
    )


def _vision_to_text() -> nn.Module:
    encoder = hf.ViTConfig(**IMAGES)
    decoder = hf.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return hf.VisionEncoderDecoderModel(config)


def _encoder_decoder() -> nn.Module:
    encoder = hf.BertConfig(**ENCODER)
    decoder = hf.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return hf.EncoderDecoderModel(config)


def _speech(name: str, **more: Any) -> Callable[[], nn.Module]:
    settings = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16, **more}
    settings.pop("max_position_embeddings")
    return lambda: getattr(hf, f"{name}ForConditionalGeneration")(getattr(hf, f"{name}Config")(**settings))


def _seq2seq(config: str, model: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**{**SEQ2SEQ, **more}))


def _t5(name: str) -> Callable[[], nn.Module]:
    size = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return lambda: getattr(hf, f"{name}ForConditionalGeneration")(
        getattr(hf, f"{name}Config")(**size, decoder_start_token_id=0, pad_token_id=0)
    )


def _speech_frames(rows: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, 20, dtype=torch.long)
    mask[:, 16:] = 0
    return {"input_features": noise(rows, 20, 8), "attention_mask": mask, "labels": labels_of(rows)}


ATTENTION = ["q_proj", "v_proj"]
FAMILIES: dict[str, Family] = {
    name: Family(_seeded(make), batch, modules)
    for name, (make, batch, modules) in {
        "Llama": (tiny_llama, lambda n: {"input_ids": tokens(n), "labels": tokens(n)}, ATTENTION),
        "T5": (_t5("T5"), text_to_text, ["q", "v"]),
        "BART": (_seq2seq("BartConfig", "BartForConditionalGeneration"), text_to_text, ATTENTION),
        "MBART": (_seq2seq("MBartConfig", "MBartForConditionalGeneration"), text_to_text, ATTENTION),
        "Marian": (_seq2seq("MarianConfig", "MarianMTModel"), text_to_text, ATTENTION),
        "M2M100": (_seq2seq("M2M100Config", "M2M100ForConditionalGeneration"), text_to_text, ATTENTION),
        "BART classifier": (
            _seq2seq("BartConfig", "BartForSequenceClassification", num_labels=3),
            lambda n: {"input_ids": torch.cat([tokens(n, 8), torch.full((n, 1), 2)], 1), "labels": torch.arange(n) % 3},
            ATTENTION,
        ),
        "FSMT": (  # its decoder's inputs are made from the source, with labels or without
            _seq2seq("FSMTConfig", "FSMTForConditionalGeneration", langs=["a", "b"], **FSMT_TOKENS),
            lambda n: {**text_to_text(n), "labels": tokens(n, seed=1)},
            ATTENTION,
        ),
        "LED": (
            _seq2seq(
                "LEDConfig",
                "LEDForConditionalGeneration",
                attention_window=4,
                max_encoder_position_embeddings=64,
                max_decoder_position_embeddings=64,
            ),
            text_to_text,
            ["q_proj", "v_proj", "query"],
        ),
        "Whisper": (
            _speech("Whisper"),
            lambda n: {"input_features": noise(n, 8, 40), "labels": labels_of(n)},
            ATTENTION,
        ),
        "Speech2Text": (
            _speech(
                "Speech2Text", conv_channels=16, input_feat_per_channel=8, num_conv_layers=1, conv_kernel_sizes=(3,)
            ),
            _speech_frames,
            ATTENTION,
        ),
        "Pix2Struct": (_pix2struct, _pix2struct_batch, ["query", "value"]),
        "BLIP": (
            _blip,
            lambda n: {"pixel_values": noise(n, 3, 8, 8), "input_ids": tokens(n), "labels": tokens(n)},
            ["query", "value", "qkv"],
        ),
        "ViT to BERT": (
            _vision_to_text,
            lambda n: {"pixel_values": noise(n, 1, 8, 8), "labels": labels_of(n)},
            ["query", "value"],
        ),
        "BERT to BERT": (_encoder_decoder, text_to_text, ["query", "value"]),
        "ViT classifier": (
            tiny_vit,
            lambda n: {"pixel_values": noise(n, 1, 8, 8), "labels": torch.arange(n) % 10},
            ATTENTION,
        ),
        "token classifier": (
            lambda: hf.BertForTokenClassification(hf.BertConfig(**ENCODER, num_labels=5)),
            lambda n: {"input_ids": tokens(n), "labels": tokens(n, first=0) % 5},
            ["query", "value"],
        ),
        "masked language model": (
            lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)),
            lambda n: {"input_ids": tokens(n), "labels": tokens(n, seed=1)},
            ["query", "value"],
        ),
        "regression": (
            lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=1)),
            lambda n: {"input_ids": tokens(n), "labels": torch.arange(n) / 3},
            ["query", "value"],
        ),
        "question answering": (
            lambda: hf.BertForQuestionAnswering(hf.BertConfig(**ENCODER)),
            span,
            ["query", "value"],
        ),
        "tuples": (lambda: Tuples(tiny_llama()), lambda n: {"input_ids": tokens(n), "labels": tokens(n)}, ATTENTION),
        "tuples, question answering": (
            lambda: hf.BertForQuestionAnswering(hf.BertConfig(**ENCODER, return_dict=False)),
            span,
            ["query", "value"],
        ),
        "module of one's own": (
            Plain,
            lambda n: {"input_ids": tokens(n), "labels": tokens(n, seed=1)},
            ["first", "second"],
        ),
        "teacher forcing": (
            TeacherForced,
            lambda n: {"input_ids": tokens(n), "labels": tokens(n, seed=1)},
            ["first", "second"],
        ),
    }.items()
}
