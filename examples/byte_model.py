"""A small Llama with random weights and a byte tokenizer: a stand-in until a trained model ships.

    python examples/byte_model.py FOLDER

What it says means nothing. Its attention is spread and its queries repeat about as much as
a trained model's, so that MAC has something to match.
"""

import json
import sys
from pathlib import Path

import torch

BYTES = 256
SPECIALS = ["<bos>", "<eos>", "<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB = BYTES + len(SPECIALS)
BOS, EOS, PAD = BYTES, BYTES + 1, BYTES + 2
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 32768


def write_tokenizer(path: Path) -> None:
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
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=CONTEXT,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    # Requests must not inherit sampling defaults.
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))


def write_model(path: Path, seed: int = 0) -> None:
    """A Llama of 4 layers, 8 query and 2 KV heads of size 64, 4 M parameters, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="float32",
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                continue
            # Elements of pre-RoPE queries near 0.35, of scores near 1.5, of logits near 4.
            size = 0.35 if "q_proj" in name else 4.0 if "k_proj" in name or "lm_head" in name else 1.0
            weight.normal_(0.0, size if "embed" in name else size * weight.shape[-1] ** -0.5)
    model.save_pretrained(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    write_model(folder)
    write_tokenizer(folder)
    print(folder)
