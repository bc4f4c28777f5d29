"""A small Llama with random weights, for tests, and the byte tokenizer that the testbed has too.

    python examples/byte_model.py FOLDER

What it says means nothing, but it decodes like a model, and MAC has something to match.
"""

import json
import math
import sys
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
CONTEXT = 32768
QUERY_STD, LOGIT_STD, OUTPUT_STD = 0.6, 3.0, 10.0


def write_tokenizer(path: Path, context: int = CONTEXT) -> None:
    """Byte tokenizer with a chat template: the id of a byte is its value, the specials follow."""
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
        model_max_length=context,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    # Requests must not inherit sampling defaults.
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))


@torch.no_grad()
def rescale(model, config) -> None:
    """Redraw every weight of a decoder, by the role its name tells, so that it decodes like one.

    * Attention scores have a standard deviation near 3, and attention writes as much into the
      residual stream as the embedding does, so tokens depend on what attention reads far back.
    * Pre-RoPE queries have elements near 0.6 (keys near 5), so that at threshold 0.45 some of
      them match and some do not.
    * Logits have a standard deviation near 10, so that the gap between the two best tokens is
      far above rounding and greedy decoding does not depend on the order of a sum.
    """
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


def write_model(path: Path, seed: int = 0) -> None:
    """A Llama of 4 layers, 8 query and 2 KV heads of size 64, 3 M parameters, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="float32",
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    rescale(model, config)
    model.save_pretrained(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    write_model(folder)
    write_tokenizer(folder)
    print(folder)
