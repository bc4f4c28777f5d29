"""Exact decoding of the same step by FlashInfer and by FlashAttention, called as vLLM calls them."""

from collections.abc import Callable, Iterator

import torch

from vllm_mac.tools.bench.synthetic_step import DecodeStep

Calls = list[Callable[[], object]]


def flashinfer(step: DecodeStep) -> Iterator[tuple[str, Calls]]:
    """FlashInfer's paged decode with tensor cores, planned once on the host for all layers."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape, device = step.shape, step.ring.device
    rows, pages = shape.batch, shape.row_pages
    ints = lambda n: torch.zeros(n, dtype=torch.int32, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(1 << 28, dtype=torch.uint8, device=device), "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=ints(rows + 1), paged_kv_indices_buffer=ints(rows * pages),
        paged_kv_last_page_len_buffer=ints(rows),
    )  # fmt: skip
    indptr = torch.arange(rows + 1, dtype=torch.int32) * pages
    last = torch.full((rows,), shape.context - (pages - 1) * shape.page, dtype=torch.int32)
    wrapper.plan(
        indptr, step.block_table.flatten(), last, shape.heads, shape.kv_heads, shape.head_size, shape.page,
        q_data_type=shape.dtype, kv_data_type=shape.dtype, sm_scale=step.scale,
    )  # fmt: skip

    def call(layer):
        key, value = _key_value(layer.kv, shape.head_size)
        return lambda: wrapper.run(layer.query, (key, value), out=layer.out)

    yield "", [call(layer) for layer in step.layers]


def flash_attention(step: DecodeStep) -> Iterator[tuple[str, Calls]]:
    """FlashAttention (3 on Hopper, else 2), scheduled once for all layers.

    On Hopper it runs twice: with its own number of split-KV parts, and with vLLM's limit for full CUDA graphs.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    shape, device = step.shape, step.ring.device
    begin = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    length = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    version = 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2

    def call(layer, options):
        key, value = _key_value(layer.kv, shape.head_size)
        return lambda: flash_attn_varlen_func(
            q=layer.query, k=key, v=value, max_seqlen_q=1, cu_seqlens_q=begin, max_seqlen_k=shape.context, seqused_k=length,
            softmax_scale=step.scale, causal=True, block_table=step.block_table, out=layer.out, fa_version=version, **options,
        )  # fmt: skip

    for splits in (0, 32) if version == 3 else (0,):
        options = {}
        if version == 3:
            schedule = get_scheduler_metadata(
                batch_size=shape.batch, max_seqlen_q=1, max_seqlen_k=shape.context, num_heads_q=shape.heads,
                num_heads_kv=shape.kv_heads, headdim=shape.head_size, cache_seqlens=length, qkv_dtype=shape.dtype,
                cu_seqlens_q=begin, page_size=shape.page, causal=True, num_splits=splits,
            )  # fmt: skip
            options = {"scheduler_metadata": schedule, "num_splits": splits}
        yield f"v{version}, splits {splits}", [call(layer, options) for layer in step.layers]


def _key_value(kv: torch.Tensor, head_size: int):
    """`[blocks, page, K, D]` each."""
    return kv[..., :head_size].transpose(1, 2), kv[..., head_size:].transpose(1, 2)


BASELINES = {"FLASHINFER": flashinfer, "FLASH_ATTN": flash_attention}
