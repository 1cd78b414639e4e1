"""Random models of nearly every text architecture of transformers, a few thousand parameters each.

A configuration is made from its class's own fields: whatever is called like a size gets a small one, dropout none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

# size → the names it goes by in transformers' configurations
_SIZES: dict[float, str] = {
    0.0: """dropout attention_dropout activation_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop
        embd_pdrop attn_pdrop hidden_dropout dropout_rate classifier_dropout embed_dropout resid_dropout emb_pdrop
        embedding_dropout dropout_p residual_dropout encoder_layerdrop decoder_layerdrop layerdrop router_jitter_noise
        jitter_noise input_jitter_noise""",
    1: """n_shared_experts n_group topk_group first_k_dense_replace n_groups mamba_n_groups num_sparse_encoder_layers
        num_sparse_decoder_layers""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers num_key_value_heads num_experts_per_tok moe_k moe_topk expand mamba_expand n_mamba_heads
        linear_num_key_heads index_n_heads swa_num_key_value_heads""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts
        num_encoder_attention_heads num_decoder_attention_heads num_local_experts n_routed_experts moe_num_experts
        mamba_dt_rank time_step_rank linear_num_value_heads rotary_dim prompt_length swa_num_attention_heads""",
    8: """head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank mamba_d_state state_size mamba_d_head
        mamba_n_heads mamba_num_heads mamba_head_dim ssm_state_size linear_key_head_dim linear_value_head_dim
        swa_head_dim hidden_size_per_layer_input""",
    16: """moe_intermediate_size q_lora_rank shared_expert_intermediate_size shared_intermediate_size chunk_size
        mamba_chunk_size index_head_dim""",
    32: """hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim attention_hidden_size lru_width
        input_embedding_size output_embedding_size""",
    48: """intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff mamba_d_ssm
        dense_ffn_hidden_size intermediate_size_mlp expert_ffn_hidden_size""",
    64: "expert_capacity index_topk",
    128: """max_position_embeddings n_positions n_ctx max_encoder_position_embeddings max_decoder_position_embeddings
        context_length max_sequence_length max_seq_len max_source_positions max_target_positions""",
}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 0, "sep_token_id": 1}
_VOCABULARIES = ("vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")
_ENCODERS = """bert camembert electra ernie data2vec-text megatron-bert rembert roberta roberta-prelayernorm roc_bert
    roformer xlm-roberta xlm-roberta-xl xmod big_bird bert-generation""".split()  # noqa: SIM905
_LATENT = """axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear
    longcat_flash minicpm3 sarvam_mla youtu""".split()  # noqa: SIM905  attention with one latent: as many keys as queries
# what no size by name can say
_ALSO: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "led": {"attention_window": [8, 8]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "mpt": {"attn_pdrop": 0, "resid_pdrop": 0, "emb_pdrop": 0, "attn_config": {"attn_pdrop": 0}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "roc_bert": {
        "pronunciation_vocab_size": 50, "shape_vocab_size": 50, "enable_pronunciation": False, "enable_shape": False,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEQ2SEQ = tuple(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, vocab: int, *, seq2seq: bool, **changes: Any) -> Any:
    """A configuration of this model type with small sizes; `changes` come last."""
    if model_type == "encoder-decoder":
        return _two_berts(vocab)
    kind = CONFIG_MAPPING[model_type]
    fields = _fields(kind, vocab) | _ALSO.get(model_type, {})
    if seq2seq:
        fields["decoder_start_token_id"] = 0
    if model_type in _ENCODERS:
        fields["is_decoder"] = True
    if model_type in _LATENT:
        fields["num_key_value_heads"] = 4
    return kind(**(fields | changes))


def _fields(kind: Any, vocab: int, depth: int = 0) -> dict[str, Any]:
    """Small values for the fields that the class has by itself."""
    default = kind()
    own = {name: getattr(default, name, None) for name in vars(default)}
    known = set(own) | set(getattr(kind, "attribute_map", {}) or {})
    found: dict[str, Any] = {name: vocab for name in _VOCABULARIES if name in known}
    for size, names in _SIZES.items():
        for name in set(names.split()) & known:
            if own.get(name) is not None or name not in ("head_dim", "q_lora_rank"):
                found[name] = size
    found |= {name: token for name, token in _IDS.items() if name in known}
    for name, value in own.items():
        if isinstance(value, list) and name.endswith("layer_types"):
            found[name] = (sorted(set(value), key=value.index) * 2)[:2]
        if type(value).__name__.endswith("Config") and hasattr(value, "to_dict") and depth < 3:
            found[name] = _fields(type(value), vocab, depth + 1) | {"model_type": type(value).model_type}
    return found


def _two_berts(vocab: int) -> Any:
    from transformers import BertConfig, EncoderDecoderConfig

    sizes = {
        "vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), BertConfig(**sizes))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 0, 1
    return config


def tiny_architecture(model_type: str, vocab: int, *, seq2seq: bool, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode, its matrices large enough that answers depend on the whole prompt."""
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        module = auto.from_config(tiny_config(model_type, vocab, seq2seq=seq2seq, **changes))
        for parameter in module.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point() and parameter.requires_grad:
                parameter.normal_(std=0.15)
    return module.eval()
