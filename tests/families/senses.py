"""Images, sound, and images with text: both towers of the models that have two are adapted."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.families.decoders import GROUPED
from tests.families.family import VOCABULARY, Family, built, noise, tokens

IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONTRAST_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
SOUND = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "classifier_proj_size": 16,
}
BOTH = r".*(q_proj|k_proj|v_proj|out_proj|o_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
"""Attention and MLP of language and vision towers, which have other names for the same."""
IMAGE_TOKEN = VOCABULARY - 1


def classified(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(rows, 3, 8, 8), "labels": torch.arange(rows) % 3}


def matched(rows: int) -> dict[str, Tensor]:
    ids = torch.cat([tokens(rows, 6), torch.full((rows, 1), 2)], 1)
    return {"input_ids": ids, "pixel_values": noise(rows, 3, 8, 8)}


def contrast(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, return_loss=True)["loss"]
    return loss


def described(rows: int) -> dict[str, Tensor]:
    """An image in four tokens, and a text about it."""
    text = tokens(rows, 6).clamp(max=IMAGE_TOKEN - 1)
    ids = torch.cat([torch.full((rows, 4), IMAGE_TOKEN), text], 1)  # (rows, 4 + 6)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": noise(rows, 3, 8, 8),
        "labels": labels,
    }


def with_types(rows: int) -> dict[str, Tensor]:
    """PaliGemma's training: which tokens are prefix, and which are to be learnt."""
    batch = described(rows)
    return {**batch, "token_type_ids": (batch["labels"] != -100).long()}


def patches(rows: int) -> dict[str, Tensor]:
    """Qwen2-VL's: one image per row, cut in 4 × 4 patches, of which four become one token."""
    batch = described(rows)
    batch["pixel_values"] = noise(rows * 16, 3 * 2 * 2 * 2)  # (patches, channels · frames · height · width)
    types = (batch["input_ids"] == IMAGE_TOKEN).int()
    return {**batch, "image_grid_thw": torch.tensor([[1, 4, 4]] * rows), "mm_token_type_ids": types}


def transcribed(rows: int) -> dict[str, Tensor]:
    return {"input_values": noise(rows, 400), "labels": tokens(rows, 4) % 13 + 2}


SENSES: dict[str, Family] = {
    "ViT": Family(
        "one class per image",
        built("ViTConfig", "ViTForImageClassification", **IMAGE, num_labels=3),
        classified,
    ),
    "DINOv2": Family(
        "one class per image",
        built(
            "Dinov2Config",
            "Dinov2ForImageClassification",
            **{key: value for key, value in IMAGE.items() if key != "intermediate_size"},
            mlp_ratio=2,
            num_labels=3,
        ),
        classified,
        ["query", "key", "value", "dense", "fc1", "fc2"],
    ),
    "Swin": Family(
        "one class per image",
        built(
            "SwinConfig",
            "SwinForImageClassification",
            image_size=8,
            patch_size=1,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
            num_labels=3,
        ),
        classified,
    ),
    "CLIP": Family(
        "images with texts",
        built("CLIPConfig", "CLIPModel", text_config=CONTRAST_TEXT, vision_config=IMAGE, projection_dim=32),
        matched,
        BOTH,
        output="logits_per_image",
        loss_fn=contrast,
        parts=("text_model", "vision_model"),
    ),
    "SigLIP": Family(
        "images with texts",
        built("SiglipConfig", "SiglipModel", text_config=CONTRAST_TEXT, vision_config=IMAGE),
        matched,
        r".*(q_proj|k_proj|v_proj|encoder.*out_proj|fc1|fc2)",  # the pooling head has an nn.MultiheadAttention
        output="logits_per_image",
        loss_fn=contrast,
        parts=("text_model", "vision_model"),
    ),
    "LLaVA": Family(
        "text about an image",
        built(
            "LlavaConfig",
            "LlavaForConditionalGeneration",
            text_config={"model_type": "llama", **GROUPED},
            vision_config={"model_type": "clip_vision_model", **IMAGE, "num_hidden_layers": 3},
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
        ),
        described,
        BOTH,
        parts=("language_model", "vision_tower"),
    ),
    "PaliGemma": Family(
        "text about an image",
        built(
            "PaliGemmaConfig",
            "PaliGemmaForConditionalGeneration",
            text_config={"model_type": "gemma", **GROUPED, "head_dim": 8},
            vision_config={"model_type": "siglip_vision_model", **IMAGE, "vision_use_head": False},
            image_token_index=IMAGE_TOKEN,
            projection_dim=32,
        ),
        with_types,
        BOTH,
        parts=("language_model", "vision_tower"),
    ),
    "Qwen2-VL": Family(
        "text about an image",
        built(
            "Qwen2VLConfig",
            "Qwen2VLForConditionalGeneration",
            text_config={**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 2,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            image_token_id=IMAGE_TOKEN,
            vision_start_token_id=VOCABULARY - 3,
            vision_end_token_id=VOCABULARY - 2,
            video_token_id=VOCABULARY - 4,
        ),
        patches,
        r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2)",
        parts=("language_model", "visual"),
    ),
    "wav2vec2": Family(
        "speech to text, CTC",
        built("Wav2Vec2Config", "Wav2Vec2ForCTC", **SOUND),
        transcribed,  # all-linear: with its lm_head
    ),
    "HuBERT": Family(
        "one class per sound",
        built("HubertConfig", "HubertForSequenceClassification", **SOUND, num_labels=3),
        lambda n: {"input_values": noise(n, 400), "labels": torch.arange(n) % 3},
        ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"],
    ),
}
