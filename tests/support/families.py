"""A tiny random model of every causal-LM family of the installed transformers."""

import re
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

# What a config's number becomes, by the first pattern that its name matches.
SIZES = {
    r"qk_nope_head_dim": 6,
    r"qk_rope_head_dim": 4,
    r"qk_head_dim": 10,
    r"q_lora_rank": 12,
    r"kv_lora_rank": 10,
    r"(mamba|ssm)_n_heads|mamba_num_heads|linear_num_\w+_heads|mamba_n_groups|ssm_n_groups|n_groups": 2,
    r"(\w+_)?head_dim|attention_head_dim|kv_channels|dim_head|d_head": 8,
    r"(\w+_)?vocab_size(_\w+)?": 64,
    r"hidden_size|d_model|n_embd|dim(_model)?|emb(ed)?_dim|(input_)?embedding_size|word_embed_proj_dim": 32,
    r"(\w+_)?intermediate_size(_\w+)?|(\w+_)?ffn_dim|(\w+_)?ffn_hidden_size|n_inner|dim_ff|dff|\w*mlp_dim": 48,
    r"(num_|n_|num_hidden_|encoder_|decoder_|num_encoder_|num_decoder_)layers|depth|n_layer": 2,
    r"(\w+_)?(num|n|encoder|decoder)_(\w*key_value|kv)_heads": 2,
    r"(\w+_)?(num|n|encoder|decoder|index)_(\w*attention_)?heads?|n_head|attention_heads": 4,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_length|max_seq_length": 128,
    r"(num_(local_)?|n_routed_|moe_num_)experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts": 2,
    r"n_group|topk_group": 1,
    r"ssm_state_size|(mamba_)?d_state|state_size": 8,
    r"\w*pad_token_id": 0,
    r"\w*(bos|sep|cls|decoder_start)_token_id": 1,
    r"\w*eos_token_id": 2,
    r"\w*token_(id|index)": 3,
}
# Left to the config to derive anew.
DERIVED = {"model_type", "transformers_version", "architectures", "dtype", "per_layer_config", "mlp_layer_types"}
DERIVED |= {"_name_or_path", "output_attentions"}  # which DBRX of transformers 5.17 writes, but does not take

# What the sizes above leave at odds, by family.
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_ssm": 64}
HEAD = {"head_dim": 8}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [0, 1]},
    "cpmant": {"prompt_length": 1},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "big_bird": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32, "head_dim": 8},
        "decoder_config": {"hidden_size_global": 32},
        "global_config": {"encoder_cross_output_size": 64},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"o_lora_rank": 8, "o_groups": 2},
    "dots3_note": {"layer_types": ["indexed_attention"] * 2},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": MAMBA,
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["attention", "attention"]},
    "hrm_text": {"num_layers_per_stack": 1},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "ministral": HEAD,
    "nemotron": {**HEAD, "num_key_value_heads": 2},
    "phi4_multimodal": {"audio_config": {"num_blocks": 1, "nemo_conv_channels": 32, "ext_pw_out_channel": 32}},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "rwkv": {"context_length": 8, "attention_hidden_size": 32},
    "reformer": {"axial_pos_embds": False},
    "xglm": {"attention_heads": 4},
    "xlm": {"causal": True},
    "xlstm": {"num_blocks": 2, "embedding_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 3,
        "mamba_dt_rank": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [0, 2],
        "num_hidden_layers": 3,
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
CHANGES["dots3_note_text"] = CHANGES["dots3_note"]
CHANGES["gemma3n"] = {"text_config": CHANGES["gemma3n_text"]}
CHANGES["qwen4_exp"] = CHANGES["qwen4_exp_text"]


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A config's values with small numbers, and one or two layers of each kind that it has."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in DERIVED:
            continue
        if isinstance(value, dict):
            value = shrunk(value)
        elif (isinstance(value, int) and not isinstance(value, bool)) or (value is None and name == "pad_token_id"):
            value = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value)
        elif name in ("layer_types", "layers_block_type") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            value = (kinds * 2)[: max(2, len(kinds))]
            small["num_hidden_layers"] = len(value)
        small[name] = value
    if "kv_lora_rank" in small:
        # Latent attention has a key for every query, and turns its rotary part only.
        small |= {"num_key_value_heads": 4, "head_dim": 4}
    if "is_decoder" in small:
        small["is_decoder"] = True
    return small


def updated(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(config.get(name), dict)
        config[name] = updated(config[name], value) if nested else value
    return config


def family_model(family: str, **changes: Any) -> torch.nn.Module:
    """The tiny model of a `model_type`, with random weights, the same at every call; `changes` to its config."""
    cls = getattr(transformers, CLASSES[family])
    config_cls = transformers.CONFIG_MAPPING[family]
    if cls.config_class is not None and not issubclass(config_cls, cls.config_class):
        # The text part of a multimodal config.
        config_cls = cls.config_class
    config = config_cls(**updated(shrunk(config_cls().to_dict()), CHANGES.get(family, {}) | changes))
    torch.manual_seed(0)
    return cls(config)
