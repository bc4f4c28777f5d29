"""Weights of models that need no download: random ones by which a few tokens of each context matter, as in real models.

vLLM's own dummy weights are so small that every token weighs alike. `rule: index` would then read all of them or none.
"""

import torch
from torch import nn

from vllm_mac.tools.bench.synthetic_index import LAST_SPREAD, sharpness

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.inference_mode()
def sharpen(model: nn.Module, context: int, seed: int) -> int:
    """Draw a Llama's embedding, norms, and projections to queries and keys anew. Returns how many layers it found.

    Logits and keys are spread as `synthetic_index` has them: in each head logits are normal, with the deviation of
    `sharpness` at `context` tokens. The two dimensions that RoPE rotates together are alike. Other weights stay as they
    are: they are small, so each layer sees the embedding of its token. Projections that vLLM has packed, as it does on CPUs, or
    quantised stay too.
    """
    found = 0
    for i, (name, module) in enumerate(model.named_modules()):
        kind, weight = name.rpartition(".")[2], getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        # Each module has numbers of its own, or they would correlate.
        draw = torch.Generator(weight.device).manual_seed((seed << 20) + i)
        if kind == "embed_tokens":
            weight.normal_(generator=draw)
        elif "norm" in kind:
            weight.fill_(1.0)
        elif kind == "qkv_proj":
            size, queries, keys = module.head_size, module.num_heads, module.num_kv_heads  # of this rank
            if weight.dim() < 2 or weight.dtype not in DTYPES or len(weight) != (queries + 2 * keys) * size:
                continue
            found += 1
            spread = torch.linspace(1, LAST_SPREAD, size // 2, device=weight.device).repeat(2)
            to_query, to_key, _ = weight.split([queries * size, keys * size, keys * size])
            unit = weight.shape[1] ** -0.5  # of a row, by which its products have a deviation of 1
            deviation = sharpness(queries // keys, context) / float(spread.square().mean().sqrt())
            to_query.normal_(std=deviation * unit, generator=draw)
            to_key.normal_(std=unit, generator=draw).unflatten(0, (keys, size)).mul_(spread[:, None].to(weight.dtype))
    return found
