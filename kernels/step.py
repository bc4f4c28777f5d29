"""A layer's whole step in one launch, for batches so small that a launch is much of it.

The first programs of the grid are those of `hit`, the others those of `exact`: these wait until
every group is decided, then read the prefixes of the missed ones and complete them, while the last hits are
still being amended. Each of them waits for a word of its own, to which every group adds its decision
(see `group.hit_program`), so that nothing has to be reset by agreement between programs.

A program waits only for programs of lower numbers, and those a GPU starts first. (As Triton's interpreter
does, which runs them one after the other.) So they never hold the place of one that they wait for.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.exact import TritonExact
from vllm_mac.kernels.group import hit_program
from vllm_mac.kernels.hit import program_arguments
from vllm_mac.kernels.prefix import prefix_program

MAX_GROUPS = 32  # bits of the lower half of a word


# Rows change from step to step, and what depends on them must not compile it anew.
@triton.jit(do_not_specialize=("s_table", "groups"))
def _step_kernel(
    p_query, p_cos_sin, p_position, p_ring, p_first, p_table, p_kv,
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    p_out, p_source, p_hit, p_counters, p_key, p_key_lse, p_band_acc, p_band_sum, p_part_out, p_part_lse,
    p_arrived, p_paused, mail,
    s_query_row, s_query_head, s_table, s_block, s_head, s_token, s_out_row, s_out_head,
    log2_scale, bound, strict, lag_weight, mass_floor,
    part_out, part_lse, arrived, groups, first_token, band, scale_log2,
    PARTS: tl.constexpr, READERS: tl.constexpr, MAILS: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, SINK: tl.constexpr, WHOLE: tl.constexpr, MIN_CONTEXT: tl.constexpr, MAX_CHAIN: tl.constexpr,
    LAGGED: tl.constexpr, RELATIVE: tl.constexpr, ANCHORED: tl.constexpr, WEIGHED: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
    S: tl.constexpr, BW: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr,
    SCAN_STAGES: tl.constexpr,
    NB: tl.constexpr, BB: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    MP: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
    TP: tl.constexpr, BAND_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    P: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, OF_HITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i_p = tl.program_id(0)
    hits = groups * PARTS
    if i_p >= hits:
        prefix_program(
            i_p - hits, READERS,
            p_query, p_kv, p_table, p_position, None, p_out, None, part_out, part_lse, arrived, mail,
            groups, first_token, band, scale_log2,
            s_query_row, s_query_head, s_block, s_head, s_token, s_table, s_out_row, s_out_head, 0,
            p_ring, p_cos_sin, p_part_out, p_part_lse, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
            K, G, D, PAGE, BN, BG, BM, BD, BR, P, UNROLL, STAGES, DOT, OF_HITS, W, SINK, ROTARY, NEOX,
        )  # fmt: skip
        return
    # Not in an `else`: a function that returns early is inlined at the top level only.
    i_group = i_p // PARTS
    hit_program(
        i_p % PARTS, i_group % K, (i_group // K).to(tl.int64),
        p_query, p_cos_sin, p_position, p_ring, p_first, p_table, p_kv,
        p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
        p_out, p_source, p_hit, p_counters, p_key, p_key_lse, p_band_acc, p_band_sum, p_part_out, p_part_lse,
        p_arrived, p_paused, mail, READERS,
        s_query_row, s_query_head, s_table, s_block, s_head, s_token, s_out_row, s_out_head,
        log2_scale, bound, strict, lag_weight, mass_floor,
        K, G, D, W, PAGE, BAND, SINK, WHOLE, MIN_CONTEXT, MAX_CHAIN, LAGGED, RELATIVE, ANCHORED, WEIGHED,
        ROTARY, NEOX, S, BW, SPAN, HALVES, SCAN_STAGES, NB, BB, CHUNK, BT, MP, M, DP, SP,
        TP, BAND_STAGES, NEAR_STAGES, MAILS,
    )  # fmt: skip


def fits(rows: int, engine: TritonExact) -> bool:
    """Whether one launch is faster than two for a batch of so many rows.

    It is as long as the engine's programs are enough to scan each head's ring by four, as measured on an H200.
    """
    return rows * engine.problem.kv_heads <= MAX_GROUPS and 4 * rows * engine.problem.heads <= engine.programs


def decode_step(
    query, position, ring, first, block_table, kv, store, config, scale, work, out, counters, engine: TritonExact,
    cos_sin=None, is_neox=True, paused=None,
) -> None:  # fmt: skip
    """What `hit.decode_hits` and `engine.run` with a `Completion` do, in one launch.

    Arguments are as for `decode_hits`. Raises `ValueError` for more than `MAX_GROUPS` KV groups, or
    where `work.whole` is false: the two kinds of programs would not expect the same decisions.
    """
    rows, groups = len(query), len(query) * kv.shape[1]
    if not work.whole:
        raise ValueError("work: whole is False, choose True, as for an engine that completes")
    if groups > MAX_GROUPS:
        raise ValueError(f"query: {rows} rows of {kv.shape[1]} KV heads, choose at most {MAX_GROUPS} groups in all")
    parts, arguments, _ = program_arguments(  # warps and registers go by the engine here
        query, position, ring, first, block_table, kv, store, config, scale, work, out, counters, cos_sin, is_neox,
        paused, engine.programs,
    )  # fmt: skip
    # The engine's pipeline leaves room for two of its blocks after the match.
    arguments["BT"] = 2 * min(arguments["BT"], engine.tuning.block)
    _step_kernel[(parts * groups + engine.programs,)](
        **{**engine.arguments(rows), **arguments}, mail=engine.mail,
        PARTS=parts, READERS=engine.programs, MAILS=triton.next_power_of_2(engine.programs),
        PDL=work.pdl, **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
