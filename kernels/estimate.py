"""Device code of `weigh` and `lookup`: estimates of scores by the codes of keys. `key_index.estimate` is the oracle.

Queries are the rows of products and tokens their columns.
"""

import triton
import triton.language as tl

from vllm_mac import key_index
from vllm_mac.kernels.entry import INTERPRETED

HALF_LEVEL = tl.constexpr(key_index.HALF_LEVEL)


@triton.jit
def narrow(q, low, high, mean, log2_scale):
    """A group's queries `[BD, BQ]` as codes are multiplied with: `(narrow_low, narrow_high, factor, constant, base)`.

    low, high: `[BD, BN]`, maps to the two halves of the directions. mean: `[BD]`, the mean key.

    The first two: `_two_bytes`, for the two halves of the directions. A score is `factor` `[BQ]` times the product of
    16 bits with the codes, plus `constant` `[BQ]`. base: `[BQ]`, to subtract from scores before `exp2`. It lies half-way
    between the mean key's score, near which many are, and the highest that codes can give, or higher, so that no sum
    overflows.
    """
    if INTERPRETED:  # see `partial.attend`
        q, low, high = q.to(tl.float32), low.to(tl.float32), high.to(tl.float32)
    q_low = tl.dot(tl.trans(low), q, input_precision="ieee")
    q_high = tl.dot(tl.trans(high), q, input_precision="ieee")
    largest = tl.maximum(tl.max(tl.abs(q_low), 0), tl.max(tl.abs(q_high), 0))
    unit = tl.maximum(largest, 1e-20) / 32512.0  # 127 * 256: what two signed bytes hold
    low_i = tl.floor(q_low / unit[None, :] + 0.5).to(tl.int32)
    high_i = tl.floor(q_high / unit[None, :] + 0.5).to(tl.int32)
    middle, factor = tl.sum(q.to(tl.float32) * mean[:, None], 0) * log2_scale, unit * log2_scale
    reach = HALF_LEVEL * factor * (tl.sum(tl.abs(low_i), 0) + tl.sum(tl.abs(high_i), 0)).to(tl.float32)
    constant = middle - HALF_LEVEL * factor * (tl.sum(low_i, 0) + tl.sum(high_i, 0)).to(tl.float32)
    base = middle + tl.maximum(reach * 0.5, reach - 100.0)
    return _two_bytes(low_i), _two_bytes(high_i), factor, constant, base


@triton.jit
def _two_bytes(x):
    """Numbers of 16 bits, `[BN, BQ]` int32, as `[BN, 2 BQ]` int8: of eight queries the upper bytes, then the lower ones.

    So both bytes of a query are in the rows of one warp's products, and in one thread's.
    """
    upper = (x + 128) >> 8
    both = tl.reshape(tl.join(upper, x - upper * 256), (x.shape[0], x.shape[1] // 8, 8, 2))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (x.shape[0], 2 * x.shape[1])).to(tl.int8)


@triton.jit
def narrow_at(p_narrow, i_bk, BQ: tl.constexpr, BN: tl.constexpr):
    """Where `weigh_kernel` leaves what `narrow` gave of a pair's queries: pointers `[2 BQ, BN]` for each half."""
    p_low = p_narrow + i_bk * (4 * BN * BQ) + tl.arange(0, 2 * BQ)[:, None] * BN + tl.arange(0, BN)[None, :]
    return p_low, p_low + 2 * BN * BQ


@triton.jit
def pages_of(p_row_table, t, end, PAGE: tl.constexpr, SPAN: tl.constexpr):
    """The pages `[SPAN / PAGE]` of the tokens `[t, t + SPAN)`, those before `end`."""
    o_p = tl.arange(0, SPAN // PAGE)
    return tl.load(p_row_table + t // PAGE + o_p, mask=t + o_p * PAGE < end, other=0)


@triton.jit
def codes_of(
    page,
    p_head_codes,
    t,
    end,
    s_code_page,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BN: tl.constexpr,
):
    """Codes `[SPAN, BN]` int8 of the tokens `[t, t + SPAN)` in pages `page`, those before `end`."""
    o_p, o_in, o_n = tl.arange(0, SPAN // PAGE), tl.arange(0, PAGE), tl.arange(0, BN)
    m_p = t + o_p * PAGE < end
    p_code = (
        p_head_codes
        + (page.to(tl.int64) * s_code_page)[:, None, None]
        + o_in[None, :, None] * HALF
        + o_n[None, None, :]
    )
    codes = tl.load(p_code, mask=m_p[:, None, None] & (o_n < HALF)[None, None, :], other=0)
    return tl.reshape(codes, (SPAN, BN))


@triton.jit
def scores_of(narrow_low, narrow_high, codes):
    """Products `[BQ, SPAN]` float32, whole numbers, of queries with codes `[SPAN, BN]` int8. Other arguments: see `narrow`.

    They are of integers: codes of 4 bits with the two bytes of each query, 128 of them at most.
    """
    if INTERPRETED:
        low, high = codes & 15, (codes >> 4) & 15
    else:  # four codes an instruction
        low = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )  # fmt: skip
        high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }", "=r,r", [codes],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    product = tl.dot(narrow_low, tl.trans(low), out_dtype=tl.int32)
    product = tl.dot(narrow_high, tl.trans(high), product, out_dtype=tl.int32)  # [2 BQ, SPAN]
    both = tl.reshape(product, (product.shape[0] // 16, 2, 8, product.shape[1]))  # see `_two_bytes`
    upper, lower = tl.split(tl.permute(both, (0, 2, 3, 1)))
    return tl.reshape(upper * 256 + lower, (product.shape[0] // 2, product.shape[1])).to(tl.float32)


@triton.jit
def shares_of(score, factor, constant, t, begin, end, PAGE: tl.constexpr):
    """Scaled scores `[BQ, pages, PAGE]`, base 2, of `scores_of`; none of tokens outside of `[begin, end)`, whole pages."""
    BQ: tl.constexpr = score.shape[0]
    PAGES: tl.constexpr = score.shape[1] // PAGE
    at = t + tl.arange(0, PAGES) * PAGE
    shift = constant[:, None] + tl.where((at >= begin) & (at < end), 0.0, float("-inf"))[None, :]  # [BQ, PAGES]
    return tl.reshape(score, (BQ, PAGES, PAGE)) * factor[:, None, None] + shift[:, :, None]


@triton.jit
def first_rows(x, BQ: tl.constexpr):
    """The first `BQ` rows of `[BR, n]`, where `BR` is `BQ` or twice as much."""
    if x.shape[0] > BQ:
        x, rest = tl.split(tl.permute(tl.reshape(x, (2, BQ, x.shape[1])), (1, 2, 0)))
    return x
