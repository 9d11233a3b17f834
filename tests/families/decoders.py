"""Causal language models: transformers with separate and with fused projections, state spaces, and a hybrid."""

from __future__ import annotations

from typing import Any

from tests.families.family import VOCABULARY, Family, built, next_token

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
OLDER = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}


def _causal(name: str, modules: list[str] | str = "all-linear", *, lora: Any = None, **settings: Any) -> Family:
    make = built(f"{name}Config", f"{name}ForCausalLM", **settings)
    return Family("next token", make, next_token, modules, lora=lora or {})


DECODERS: dict[str, Family] = {
    "Llama": _causal("Llama", **GROUPED),
    "Mistral": _causal("Mistral", **GROUPED, sliding_window=6),
    "Qwen2": _causal("Qwen2", **GROUPED),
    "Qwen3": _causal("Qwen3", **GROUPED, head_dim=8),
    "Gemma": _causal("Gemma", **GROUPED, head_dim=8),
    "Gemma 2": _causal("Gemma2", **GROUPED, head_dim=8, sliding_window=6),
    "Gemma 3": Family(
        "next token",
        built("Gemma3TextConfig", "Gemma3ForCausalLM", **GROUPED, head_dim=8, sliding_window=6),
        next_token,
    ),
    "Phi-2": _causal("Phi", **GROUPED),
    "Phi-3": _causal("Phi3", **GROUPED, original_max_position_embeddings=64),
    "OLMo": _causal("Olmo", **GROUPED),
    "OLMo 2": _causal("Olmo2", **GROUPED),
    "Granite": _causal("Granite", **GROUPED),
    "SmolLM3": _causal("SmolLM3", **GROUPED),
    "GPT-2": Family(
        "next token",
        built("GPT2Config", "GPT2LMHeadModel", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **SPECIAL),
        next_token,
        ["c_attn", "c_proj", "c_fc"],
        lora={"fan_in_fan_out": True},
    ),
    "GPT-Neo": _causal(
        "GPTNeo",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        intermediate_size=48,
        max_position_embeddings=64,
        **SPECIAL,
    ),
    "GPT-J": _causal("GPTJ", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **SPECIAL),
    "GPT-NeoX": _causal("GPTNeoX", **SIZE),
    "BLOOM": _causal("Bloom", **OLDER),
    "Falcon": _causal("Falcon", **SIZE, multi_query=True),
    "OPT": _causal(
        "OPT",
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **SPECIAL,
    ),
    "MPT": _causal(
        "Mpt",
        vocab_size=VOCABULARY,
        d_model=32,
        n_heads=4,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=64,
        **SPECIAL,
    ),
    "Mamba": _causal(
        "Mamba",
        ["in_proj", "x_proj"],  # PEFT refuses out_proj here
        vocab_size=VOCABULARY,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        time_step_rank=4,
        **SPECIAL,
    ),
    "Jamba": _causal(
        "Jamba",
        ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "x_proj", "out_proj", "gate_proj", "up_proj", "down_proj"],
        **GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=4,  # none of the two layers has experts
        expert_layer_offset=3,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
}
