"""Tiny models with random weights and a byte tokenizer, written to a folder.

    path = write("llama", folder)          # once per name and folder; later calls reuse it

The weights are scaled so that tests on them mean something:

* attention logits have a standard deviation near 3 and attention writes as much
  into the residual stream as the embedding does, so the tokens depend on what
  attention reads far back;
* pre-RoPE queries have elements near 0.6 (keys near 5), so that at threshold
  0.45 some of them match and some do not;
* output logits have a standard deviation near 10, so that the gap between the
  two best tokens is far above fp32 rounding and greedy decoding does not depend
  on the order of a sum.
"""

import json
import math
from pathlib import Path

import torch

BYTES = 256
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
SPECIALS = ["<bos>", "<eos>", "<pad>", "<unk>", *ROLES, "<|end|>"]
VOCAB = BYTES + len(SPECIALS)
BOS, EOS, PAD = BYTES, BYTES + 1, BYTES + 2
CHAT_TEMPLATE = (
    "{{ '<bos>' }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

HIDDEN = 128
QUERY_STD, LOGIT_STD, OUTPUT_STD = 0.6, 3.0, 10.0
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

    return MistralForCausalLM, MistralConfig(
        **COMMON | {"sliding_window": None, "num_key_value_heads": 1}
    )


def _phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    config = {k: v for k, v in COMMON.items() if k != "head_dim"}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Phi3ForCausalLM, Phi3Config(**config, original_max_position_embeddings=8192)


def _glm4():
    from transformers import Glm4Config, Glm4ForCausalLM

    rope = {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}
    return Glm4ForCausalLM, Glm4Config(
        **COMMON | {"head_dim": 64, "rope_parameters": rope, "attention_bias": True}
    )


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
    "deepseek": _deepseek,
    "bert": _bert,
}
DECODERS = [name for name in BUILDERS if name not in ("deepseek", "bert")]


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
        if name in DECODERS:
            _scale(model, config)
    model.save_pretrained(path)
    _write_tokenizer(path)
    (path / "done").touch()
    return path


@torch.no_grad()
def _scale(model, config) -> None:
    """Redraw every weight at the scale the module docstring gives, by the role its name tells."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q_rows = config.num_attention_heads * head_dim
    kv_rows = config.num_key_value_heads * head_dim
    key_std = LOGIT_STD / QUERY_STD
    normed = any("q_norm" in name for name, _ in model.named_parameters())
    gemma = config.model_type.startswith("gemma")

    def draw(weight, std):
        weight.normal_(0.0, std)

    for name, weight in model.named_parameters():
        fan_in = math.sqrt(weight.shape[-1])
        if "norm" in name:
            gain = QUERY_STD if "q_norm" in name else key_std if "k_norm" in name else 1.0
            weight.fill_(gain - gemma)  # Gemma's norms multiply by 1 + weight
        elif name.endswith("bias"):
            draw(weight, 0.1)
        elif "embed_tokens" in name:
            draw(weight, 1 / fan_in if gemma else 1.0)  # Gemma multiplies by sqrt(hidden)
        elif "lm_head" in name:
            draw(weight, OUTPUT_STD / fan_in)
        elif "qkv_proj" in name:  # Phi-3 stacks the three
            draw(weight[:q_rows], QUERY_STD / fan_in)
            draw(weight[q_rows : q_rows + kv_rows], key_std / fan_in)
            draw(weight[q_rows + kv_rows :], 1.0 / fan_in)
        elif "q_proj" in name:
            draw(weight, (1.0 if normed else QUERY_STD) / fan_in)
        elif "k_proj" in name:
            draw(weight, (1.0 if normed else key_std) / fan_in)
        else:
            draw(weight, 1.0 / fan_in)


def _write_tokenizer(path: Path) -> None:
    """Byte tokenizer: the id of a byte is its value, the specials follow."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=8192,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    # Requests must not inherit sampling defaults: tests set their own.
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
