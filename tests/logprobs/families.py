"""Tiny models of many families, and batches for them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}

# Families whose prompts can be shared, by model type, with the options that make them small and their windows short
EXACT = {
    "qwen2": {},
    "qwen2-window": {**WINDOWED, "use_sliding_window": True},
    "qwen3": {},
    "qwen3-window": {**WINDOWED, "use_sliding_window": True},
    "qwen3_moe": EXPERTS,
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 5},
    "gemma2": {**WINDOWED, "query_pre_attn_scalar": 8},
    "gemma3_text": WINDOWED,
    "gpt_oss": {**WINDOWED, **EXPERTS},
    "phi3": {"sliding_window": 5},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128},
}
# More of them, whose attention is sdpa
MORE = {
    "gemma": {},
    "cohere2": {"sliding_window": 5},
    "deepseek_v3": {
        **EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "exaone4": WINDOWED,
    "glm4": {},
    "granite": {},
    "mixtral": EXPERTS,
    "nemotron": {},
    "olmo3": WINDOWED,
    "phi": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": 5},
}
# Families whose prompts cannot, and what the reason says
INEXACT = {
    "mamba": ({}, "linear_attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "recurrent_gemma": ({"num_hidden_layers": 3, "lru_width": 32}, "linear_attention"),
    "qwen3_next": ({**EXPERTS, "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "llama4_text": (
        {
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"],
            "intermediate_size_mlp": 48,
        },
        "chunked_attention",
    ),
    "bloom": ({"n_head": 4, "n_layer": 2}, "position ids"),
    "rwkv": ({"attention_hidden_size": 32}, "recurrent"),
}


def tiny(name: str, options: dict, **kwargs):
    """A model with random weights; `name` is a model type and a suffix of our own."""
    options = {**SMALL, **options}
    if name == "gpt2":
        options = {key: value for key, value in options.items() if key not in ("hidden_size", "intermediate_size")}
        options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if name in ("phi3", "bloom", "rwkv", "mamba"):
        options.pop("head_dim")
    config = AutoConfig.for_model(name.split("-")[0], **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **kwargs).eval()


def batch(prompts=(9, 4, 1), members=2, seed=0, vocabulary=97):
    """A right-padded batch: one group a prompt length, completions of differing lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(3, vocabulary, (length,), generator=generator)

    heads = [draw(length) for length in prompts]
    rows, scored = [], []
    for _ in range(members):
        for head in heads:
            tail = draw(int(torch.randint(1, 9, (), generator=generator)))
            rows.append(torch.cat([head, tail]))
            scored.append(torch.tensor([0] * len(head) + [1] * len(tail)))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True)
    attention = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": pad(scored, batch_first=True)}
