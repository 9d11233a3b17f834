"""Encoder–decoders of text and of speech."""

from __future__ import annotations

from tests.families.family import VOCABULARY, Family, built, labels_of, noise, text_to_text

TEXT = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
LORA = {"task_type": "SEQ_2_SEQ_LM"}
PARTS = ("encoder.", "decoder.")

SEQ2SEQ: dict[str, Family] = {
    "T5": Family(
        "text to text", built("T5Config", "T5ForConditionalGeneration", **T5), text_to_text, lora=LORA, parts=PARTS
    ),
    "T5 1.1": Family(
        "text to text",
        built("T5Config", "T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"),
        text_to_text,
        lora=LORA,
        parts=PARTS,
    ),
    "BART": Family(
        "text to text",
        built("BartConfig", "BartForConditionalGeneration", **TEXT, max_position_embeddings=64),
        text_to_text,
        lora=LORA,
        parts=PARTS,
    ),
    "Marian": Family(
        "translation",
        built("MarianConfig", "MarianMTModel", **TEXT, max_position_embeddings=64),
        text_to_text,
        lora=LORA,
        parts=PARTS,
    ),
    "Whisper": Family(
        "speech to text",
        built(
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            **TEXT,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=16,
        ),
        lambda n: {"input_features": noise(n, 8, 40), "labels": labels_of(n)},
        parts=PARTS,
    ),
}
