"""Tiny models with random weights and a byte tokenizer, written to a folder.

    path = write("llama", folder)          # once per name and folder; later calls reuse it

`byte_model.rescale` says why tests on them mean something.
"""

from pathlib import Path

import torch
from byte_model import BOS, EOS, PAD, VOCAB, rescale, write_tokenizer

HIDDEN = 128
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
THETA = {"rope_theta": 10000.0}


def _llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = COMMON | {"rope_parameters": {"rope_type": "default", **THETA}} | changes
    return LlamaForCausalLM, LlamaConfig(**config)


def _llama3():
    rope = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=1024,
        **THETA,
    )
    # Six heads over two: a group that is no power of two.
    return _llama(rope_parameters=rope, head_dim=64, hidden_size=192, num_attention_heads=6)


def _yarn():
    rope = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=1024, **THETA)
    return _llama(rope_parameters=rope, head_dim=64, num_attention_heads=4)


def _qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    # Qwen2 has no head_dim field: it divides the hidden size.
    config = {k: v for k, v in COMMON.items() if k != "head_dim"}
    return Qwen2ForCausalLM, Qwen2Config(**config | {"num_attention_heads": 4})


def _qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM, Qwen3Config(**COMMON | {"head_dim": 64})


def _mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM, MistralConfig(**COMMON | {"sliding_window": None, "num_key_value_heads": 1})


def _phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    config = {k: v for k, v in COMMON.items() if k != "head_dim"}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Phi3ForCausalLM, Phi3Config(**config, original_max_position_embeddings=8192)


def _glm4():
    from transformers import Glm4Config, Glm4ForCausalLM

    rope = {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}
    return Glm4ForCausalLM, Glm4Config(**COMMON | {"head_dim": 64, "rope_parameters": rope, "attention_bias": True})


def _gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM, Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 4},
        layer_types=layers,
        sliding_window=64,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=None,
    )


def _gemma3_full():
    """So many more layers of one kind that vLLM makes groups of them that share their memory."""
    model_class, config = _gemma3()
    kinds = ["full_attention"] * 2 + ["sliding_attention"] + ["full_attention"] * 2
    config.update({"layer_types": kinds, "num_hidden_layers": len(kinds)})
    return model_class, config


def _lfm2():
    """Layers of short convolutions, whose states vLLM caches at boundaries inside a KV block, and one of attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = {k: v for k, v in COMMON.items() if k not in ("head_dim", "intermediate_size")} | {
        "num_attention_heads": 4
    }
    return Lfm2ForCausalLM, Lfm2Config(
        **config, intermediate_size=256, block_auto_adjust_ff_dim=False, rope_theta=10000.0, conv_dim=HIDDEN, block_dim=HIDDEN,
        layer_types=["conv", "full_attention"],
    )  # fmt: skip


def _lfm2_deep():
    """More such layers, with heads that GPUs run."""
    model_class, config = _lfm2()
    size = 2 * HIDDEN
    kinds = ["conv", "conv", "full_attention", "conv", "conv", "full_attention"]
    config.update({
        "hidden_size": size, "conv_dim": size, "block_dim": size, "layer_types": kinds, "num_hidden_layers": len(kinds),
    })  # fmt: skip
    return model_class, config


def _gptoss():
    from transformers import GptOssConfig, GptOssForCausalLM

    rope = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=1024, **THETA)
    rope |= dict(beta_fast=32.0, beta_slow=1.0, truncate=False)
    return GptOssForCausalLM, GptOssConfig(
        **COMMON | {"rope_parameters": rope, "intermediate_size": 128},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )


def _deepseek():
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = {k: v for k, v in COMMON.items() if k != "head_dim"}
    return DeepseekV2ForCausalLM, DeepseekV2Config(
        **config | {"num_key_value_heads": 8},
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=2,
        n_routed_experts=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
    )


def _longrope():
    """Phi-3's long-context variant: other factors once a server's longest sequence is longer than the original 256."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"num_attention_heads": 4}
    rope = dict(rope_type="longrope", original_max_position_embeddings=256, **THETA)
    rope |= dict(short_factor=[1 + 0.02 * i for i in range(16)], long_factor=[1 + 0.3 * i for i in range(16)])
    return Phi3ForCausalLM, Phi3Config(**config, original_max_position_embeddings=256, rope_parameters=rope)


def _smollm3():
    """One layer with RoPE and one without. vLLM runs the class by Transformers' own code."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    rope = {"rope_type": "default", **THETA}
    return SmolLM3ForCausalLM, SmolLM3Config(**COMMON, rope_parameters=rope, no_rope_layers=[1, 0])


def _opt():
    """No RoPE: positions are embedded."""
    from transformers import OPTConfig, OPTForCausalLM

    config = {k: v for k, v in COMMON.items() if k != "head_dim"}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    return OPTForCausalLM, OPTConfig(**config, ffn_dim=256, word_embed_proj_dim=HIDDEN, dropout=0.0)


def _mrope():
    """Qwen2 with the rotation of Qwen2-VL, whose positions have three parts."""
    model_class, config = _qwen2()
    config.rope_parameters = {"rope_type": "default", "mrope_section": [4, 6, 6], **THETA}
    return model_class, config


def _bert():
    from transformers import BertConfig, BertModel

    return BertModel, BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        pad_token_id=PAD,
    )


BUILDERS = {
    "llama": _llama,
    "llama3": _llama3,
    "yarn": _yarn,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "phi3": _phi3,
    "glm4": _glm4,
    "gemma3": _gemma3,
    "gemma3_full": _gemma3_full,
    "gptoss": _gptoss,
    "lfm2": _lfm2,
    "lfm2_deep": _lfm2_deep,
    "deepseek": _deepseek,
    "longrope": _longrope,
    "smollm3": _smollm3,
    "opt": _opt,
    "mrope": _mrope,
    "bert": _bert,
}
NO_ROTARY = ("longrope", "smollm3", "opt", "mrope")  # at least one layer has no rotation that `rule: match` can undo
DECODERS = [
    name
    for name in BUILDERS
    if name not in ("gemma3_full", "gptoss", "lfm2", "lfm2_deep", "deepseek", "bert", *NO_ROTARY)
]
SINK = 6.0  # weighs as much as several hundred keys of an average score


def write(name: str, folder: str | Path, seed: int = 0) -> Path:
    """The folder of tiny model `name`, written under `folder` unless it is already there."""
    path = Path(folder) / f"{name}-{seed}"
    if (path / "done").exists():
        return path
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class, config = BUILDERS[name]()
        config.dtype = "float32"
        model = model_class(config).float()
        if name in (*DECODERS, *NO_ROTARY, "gemma3_full", "gptoss"):
            rescale(model, config)
        for parameter in (p for key, p in model.named_parameters() if key.endswith("sinks")):
            parameter.data.fill_(SINK)
    model.save_pretrained(path)
    write_tokenizer(path, context=8192)
    (path / "done").touch()
    return path
