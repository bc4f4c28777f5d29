"""Dummy weights of `bench decode`: logits reach as far as the synthetic step's do."""

import pytest
import torch
from torch import nn

from vllm_mac.tools.bench.dummy_weights import sharpen
from vllm_mac.tools.bench.synthetic_index import sharpness

HEADS, KV_HEADS, SIZE, HIDDEN, CONTEXT = 8, 2, 64, 512, 4096


class Projection(nn.Linear):
    num_heads, num_kv_heads, head_size = HEADS, KV_HEADS, SIZE


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN)
        self.qkv_proj = Projection(HIDDEN, (HEADS + 2 * KV_HEADS) * SIZE, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONTEXT, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(2))


@torch.inference_mode()
def test_logits_reach_as_far_as_those_of_the_synthetic_step():
    model = Model()
    for weight in model.parameters():
        weight.uniform_(-1e-3, 1e-3)
    values = model.layers[0].qkv_proj.weight[(HEADS + KV_HEADS) * SIZE :].clone()
    assert sharpen(model, CONTEXT, 0) == 2
    assert torch.equal(model.layers[0].qkv_proj.weight[(HEADS + KV_HEADS) * SIZE :], values)
    wanted, found = sharpness(HEADS // KV_HEADS, CONTEXT), []
    for layer in model.layers:
        both = layer.qkv_proj(layer.input_layernorm(model.embed_tokens.weight))
        query, key, _ = both.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], -1)
        query = query[:64].unflatten(1, (KV_HEADS, -1, SIZE)).permute(1, 2, 0, 3).flatten(1, 2)
        logits = query @ key.unflatten(1, (KV_HEADS, SIZE)).permute(1, 2, 0) * SIZE**-0.5
        found.append(float(logits.std()))
    # Of each head 64 queries, whose lengths vary: the standard deviation of a mean of so many is 2 %.
    assert all(abs(deviation / wanted - 1) < 0.1 for deviation in found), (wanted, found)
    assert not torch.equal(*(layer.qkv_proj.weight for layer in model.layers))


@torch.inference_mode()
@pytest.mark.parametrize(
    "packed", [torch.empty(0), torch.empty(768, 512, dtype=torch.float8_e4m3fn), torch.empty(512, 768)]
)
def test_packed_and_quantised_projections_stay(packed):
    model = Model()
    for layer in model.layers:
        layer.qkv_proj.weight = nn.Parameter(packed, requires_grad=False)
    assert sharpen(model, CONTEXT, 0) == 0
