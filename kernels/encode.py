"""Index the KV pages that a step completes: the codes of their keys, and the mean of their values.

`key_index.encode` is the oracle. A page is indexed when its last slot is written, so what was written to it before, by
whomever, is what is indexed.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.entry import INTERPRETED
from vllm_mac.kernels.launch import power_of_two
from vllm_mac.kernels.scales import held, scaled
from vllm_mac.key_index import Maps, PageLayout


@triton.jit
def _direction_codes(key, p_to_key, p_shift, p_key_scale, o_d, o_n, m_d, m_n, N: tl.constexpr):
    """Codes of 4 bits `[PAGE, BN]` int32 of the directions `o_n`. key: `[PAGE, BD]`."""
    to_key = tl.load(
        p_to_key + o_d[:, None] * N + o_n[None, :], mask=m_d[:, None] & m_n[None, :], other=0.0
    )  # [BD, BN]
    shift = tl.load(p_shift + o_n, mask=m_n, other=0.0)  # [BN]
    if INTERPRETED:  # see `partial.attend`
        key, to_key = key.to(tl.float32), to_key.to(tl.float32)
    code = scaled(tl.dot(key.to(to_key.dtype), to_key, input_precision="ieee"), p_key_scale) - shift[None, :]
    return tl.minimum(tl.maximum(tl.floor(code), 0.0), 15.0).to(tl.int32)


@triton.jit
def _index_page(
    p_kv, p_codes, p_means, p_to_key, p_shift, p_key_scale, page, i_k, s_kv_page, s_kv_head, s_kv_token, s_code_page,
    s_mean_page, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write a KV head's codes and mean value of a page."""
    HALF: tl.constexpr = N // 2
    o_t, o_d, o_n = tl.arange(0, PAGE), tl.arange(0, BD), tl.arange(0, BN)
    m_d, m_n = o_d < D, o_n < HALF
    p_key = p_kv + page * s_kv_page + i_k * s_kv_head + (o_t * s_kv_token)[:, None] + o_d[None, :]
    key = tl.load(p_key, mask=m_d[None, :], other=0.0)  # [PAGE, BD]
    value = tl.load(p_key + D, mask=m_d[None, :], other=0.0)  # [PAGE, BD]
    mean = tl.sum(value.to(tl.float32), 0) / PAGE
    tl.store(p_means + page * s_mean_page + i_k * D + o_d, mean.to(p_means.dtype.element_ty), mask=m_d)
    p_map, p_offset = p_to_key + i_k * D * N, p_shift + i_k * N
    low = _direction_codes(key, p_map, p_offset, p_key_scale, o_d, o_n, m_d, m_n, N)
    high = _direction_codes(key, p_map, p_offset, p_key_scale, o_d, o_n + HALF, m_d, m_n, N)
    p_code = p_codes + page * s_code_page + i_k * PAGE * HALF + o_t[:, None] * HALF + o_n[None, :]
    tl.store(p_code, (low | (high << 4)).to(tl.uint8), mask=m_n[None, :])


@triton.jit
def encode_kernel(
    p_slot, p_kv, p_codes, p_means, p_to_key, p_shift, p_key_scale,
    s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page,
    D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program `(i_slot, i_k)`: the page of a slot that is its page's last. Without slots, page `i_slot`."""
    i_slot, i_k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if p_slot is None:
        page = i_slot.to(tl.int64)
    else:
        slot = tl.load(p_slot + i_slot).to(tl.int64)
        if (slot < 0) | (slot % PAGE != PAGE - 1):
            return
        page = slot // PAGE
    _index_page(
        p_kv, p_codes, p_means, p_to_key, p_shift, p_key_scale, page, i_k, s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page,
        D, N, PAGE, BD, BN,
    )  # fmt: skip


@triton.jit
def append_kernel(
    p_key, p_value, p_slot, p_kv, p_codes, p_means, p_to_key, p_shift, p_key_scale, p_value_scale,
    s_key_row, s_key_head, s_value_row, s_value_head, s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page,
    T: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_slot, i_k)`: a KV head's key and value to their slot, and its page's index where the slot is the last.

    Before it indexes a page, it writes what other programs may not have written yet: the same numbers as they do.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i_slot, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(p_slot + i_slot).to(tl.int64)
    if slot < 0:
        return
    page, complete = slot // PAGE, slot % PAGE == PAGE - 1
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    tokens = 1
    if T > 1:
        tokens = tl.where(complete, T if T < PAGE else PAGE, 1)
    for ahead in range(tokens):
        i_token = i_slot - ahead
        if tl.load(p_slot + i_token, mask=i_token >= 0, other=-1).to(tl.int64) == slot - ahead:
            key = tl.load(p_key + i_token * s_key_row + i_k * s_key_head + o_d, mask=m_d, other=0.0)
            value = tl.load(p_value + i_token * s_value_row + i_k * s_value_head + o_d, mask=m_d, other=0.0)
            p_token = p_kv + page * s_kv_page + i_k * s_kv_head + (slot - ahead) % PAGE * s_kv_token + o_d
            tl.store(p_token, held(key, p_key_scale, p_kv), mask=m_d)
            tl.store(p_token + D, held(value, p_value_scale, p_kv), mask=m_d)
    if complete:
        tl.debug_barrier()  # all threads read what each has just written
        _index_page(
            p_kv, p_codes, p_means, p_to_key, p_shift, p_key_scale, page, i_k, s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page,
            D, N, PAGE, BD, BN,
        )  # fmt: skip


def encode(kv: Tensor, slots: Tensor | None, layout: PageLayout, maps: Maps) -> None:
    """Index the pages of which `slots` `[n]` holds the last slot; all pages of the cache without slots.

    kv: `[blocks, K, PAGE, 2 D]` with room for the index, see `PageLayout.views`. slots: int64, below 0 for padding.
    """
    count = len(kv) if slots is None else len(slots)
    if count:
        encode_kernel[(count, layout.kv_heads)](p_slot=slots, **_page_arguments(kv, layout, maps))


def append(
    key: Tensor, value: Tensor, slots: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, pdl: bool, at_once: int = 1
) -> None:  # fmt: skip
    """Write the keys and values `[n, K, D]` of tokens to `slots` `[n]`, and index the pages that they complete.

    key, value: last dimension contiguous; rows beyond `n` are left alone. slots: int64, below 0 for padding. kv: as in `encode`.
    at_once: tokens of a page at most; they follow one another.
    """
    append_kernel[(len(slots), layout.kv_heads)](
        p_key=key, p_value=value, p_slot=slots, s_key_row=key.stride(0), s_key_head=key.stride(1),
        s_value_row=value.stride(0), s_value_head=value.stride(1), T=at_once, PDL=pdl,
        p_value_scale=maps.scales and maps.scales.value, **_page_arguments(kv, layout, maps),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _page_arguments(kv: Tensor, layout: PageLayout, maps: Maps) -> dict:
    codes, means = layout.views(kv)
    s_kv = kv.stride()
    return dict(
        p_kv=kv, p_codes=codes, p_means=means, p_to_key=maps.to_key, p_shift=maps.shift,
        p_key_scale=maps.scales and maps.scales.key,
        s_kv_page=s_kv[0], s_kv_head=s_kv[1], s_kv_token=s_kv[2], s_code_page=codes.stride(0), s_mean_page=means.stride(0),
        D=layout.head_size, N=layout.directions, PAGE=layout.page, BD=power_of_two(layout.head_size),
        BN=max(power_of_two(layout.directions // 2), 16),
        # With fewer warps, or without a limit, registers spill.
        num_warps=4 if layout.head_size <= 128 else 8, maxnreg=168 if layout.head_size <= 128 else 255,
    )  # fmt: skip
