"""Exact attention over the prefixes of the missed (row, KV head) groups, in one launch.

`TritonExact` is one of the two miss engines (`decoder.MissEngine`); `flashinfer_exact.FlashInferExact` is the other.
The oracle of `attend` is, for both, `paged.attend` over `[prefix_start, m+1-band)`. This engine also completes the
groups in its kernel (`merge.complete_miss`), so that no other launch follows.

The tokens of all missed groups are one list of units of `BN` tokens, cut into as many equal shares as there are
programs: whatever the number of misses and the lengths of their prefixes, every program reads the same number of
tokens. So a program meets at most one group that began in an earlier program and one that goes on in a later one.
Each leaves its part of such a group, and the last of them to arrive merges the parts (`split_kv`).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.launch import REGISTER_LIMITS, launch, power_of_two
from vllm_mac.kernels.partial import LOG2_E
from vllm_mac.kernels.split_kv import attend_share, complete, merge_shares, write
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.state import Geometry, LayerState, Rows

_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# Rows change from step to step, and what depends on them must not compile it anew.
@triton.jit(do_not_specialize=("groups", "s_table_row"))
def prefix_kernel(
    p_query, p_kv, p_table, p_position, p_hit, p_out, p_lse2, p_split_out, p_split_lse2, p_arrived,
    groups, first_token, band, log2_scale,
    s_query_row, s_query_head, s_kv_page, s_kv_head, s_kv_token, s_table_row,
    s_out_row, s_out_head, s_lse_row,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BBK: tl.constexpr,
    MERGE: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr, OF_HITS: tl.constexpr,
    p_ring=None, p_cos_sin=None, p_part_out=None, p_part_lse=None,
    p_ring_query=None, p_ring_out=None, p_ring_lse=None, p_ring_chain=None,
    W: tl.constexpr = 0, SINK: tl.constexpr = 0, ROTARY: tl.constexpr = 0, NEOX: tl.constexpr = True,
):  # fmt: skip
    """Program `i_p` of any number: attends to its share of the tokens of all missed groups.

    Without rings it writes attention over the prefix and its base-2 LSE. With rings it completes the groups, writes the
    layer's output and no LSE.
    """
    # 1. The list of work. Every program makes the whole list by itself: no other launch, no waiting.
    COMPLETE: tl.constexpr = p_ring_query is not None
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i_p, programs = tl.program_id(0), tl.num_programs(0)
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    o_q, o_g, o_part = tl.arange(0, BQ), tl.arange(0, BG), tl.arange(0, 2 * MERGE)
    o_bk = tl.arange(0, BBK)
    all_m = tl.load(p_position + o_bk // K, mask=o_bk < groups, other=-1).to(tl.int32)  # [BBK]
    if COMPLETE:
        all_ring = tl.load(p_ring + o_bk // K, mask=o_bk < groups, other=-1)  # [BBK]
    all_hit = tl.load(p_hit + o_bk, mask=o_bk < groups, other=0) != 0  # [BBK]
    if COMPLETE:  # the band of a row without a ring is read like its prefix
        all_m += tl.where((all_ring < 0) & (all_m >= 0), band, 0)
    tokens = tl.where(all_hit == OF_HITS, tl.maximum(all_m + 1 - band - first_token, 0), 0)
    units = (tokens + BN - 1) // BN  # [BBK]
    ends = tl.cumsum(units, 0)
    total = tl.sum(units, 0)
    share = tl.maximum((total + programs - 1) // programs, 1)
    # Merging the few parts of a group takes less time than reading another unit.
    share = tl.maximum(share, tl.minimum((tl.max(units, 0) + MERGE - 1) // MERGE, 4))

    # 2. Groups without a token to read, of which each program takes every `programs`-th.
    nothing = (all_hit == OF_HITS) & (all_m >= 0) & (tokens == 0)
    if COMPLETE:
        some = tl.sum(nothing.to(tl.int32), 0) > 0
    else:
        some = True  # the output of groups that nobody asks for is 0
    if some:
        i_bk = i_p
        while i_bk < groups:
            m = tl.load(p_position + i_bk // K).to(tl.int32)
            wanted = (tl.sum(tl.where(o_bk == i_bk, all_hit.to(tl.int32), 0), 0) == OF_HITS) & (m >= 0)
            i_row, i_k = (i_bk // K).to(tl.int64), i_bk % K
            empty = tl.full([BG], float("-inf"), tl.float32)
            zero = tl.zeros([BG, BD], tl.float32)
            if COMPLETE:
                ring = tl.load(p_ring + i_row).to(tl.int64)
                if wanted & (m + 1 - tl.where(ring < 0, 0, band) <= first_token):
                    complete(
                        zero, empty, i_row, i_k, m, ring, p_query, p_cos_sin, p_part_out, p_part_lse, p_out,
                        p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
                        s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d, K, G, D, W, SINK, ROTARY, NEOX,
                    )  # fmt: skip
            else:
                if (not wanted) | (m + 1 - band <= first_token):
                    p_o = p_out + i_row * s_out_row + i_k * G * s_out_head
                    write(p_o, p_lse2 + i_row * s_lse_row + i_k * G, zero, empty, s_out_head, o_g, o_d, G, D)
            i_bk += programs

    # 3. This program's share of the units: one turn for each group that has some of them.
    unit = i_p * share
    stop = tl.minimum(unit + share, total)
    while unit < stop:
        # 3a. The group, and which of its tokens are this program's.
        i_bk = tl.sum((ends <= unit).to(tl.int32), 0)
        group_end = tl.min(tl.where(ends > unit, ends, 2147483647), 0)
        group_start = group_end - tl.sum(tl.where(o_bk == i_bk, units, 0), 0)
        segment_end = tl.minimum(stop, group_end)
        i_row, i_k = (i_bk // K).to(tl.int64), i_bk % K
        if BBK <= 1024:  # from registers sooner than from memory, but large batches have none left
            m = tl.sum(tl.where(o_bk == i_bk, all_m, 0), 0)
            if COMPLETE:
                ring = tl.sum(tl.where(o_bk == i_bk, all_ring, 0), 0).to(tl.int64)
        else:
            m = tl.load(p_position + i_row).to(tl.int32)
            if COMPLETE:
                ring = tl.load(p_ring + i_row).to(tl.int64)
                m += tl.where(ring < 0, band, 0)
        token_end = m + 1 - band
        begin = first_token + (unit - group_start) * BN
        end = tl.minimum(first_token + (segment_end - group_start) * BN, token_end)

        # 3b. Attend to them.
        p_q = p_query + i_row * s_query_row + (i_k * G + o_q)[:, None] * s_query_head + o_d[None, :]
        q = tl.load(p_q, mask=(o_q < G)[:, None] & (o_d < D)[None, :], other=0.0)  # [BQ, BD]
        lse2, out = attend_share(
            q, i_row, begin, end, p_table, p_kv + i_k.to(tl.int64) * s_kv_head, s_table_row, s_kv_page, s_kv_token,
            log2_scale, o_q, o_n, o_d, G, D, PAGE, BN, BQ, BG, BD, STAGES, DOT,
        )  # fmt: skip

        # 3c. Where other programs have parts of the group, the last to arrive merges them.
        ready = tl.full((), 1, tl.int32)  # whether this program has the group's result
        if (unit != group_start) | (segment_end != group_end):
            i_first, i_last = group_start // share, (group_end - 1) // share
            ready, lse2, out = merge_shares(
                lse2, out, i_p, programs, i_first, i_last, p_split_out, p_split_lse2, p_arrived, o_g, o_d, o_part,
                G, D, MERGE, UNROLL,
            )  # fmt: skip

        # 3d. Complete the group, or write its result.
        if ready != 0:
            if COMPLETE:
                complete(
                    out, lse2, i_row, i_k, m, ring, p_query, p_cos_sin, p_part_out, p_part_lse, p_out,
                    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
                    s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d, K, G, D, W, SINK, ROTARY, NEOX,
                )  # fmt: skip
            else:
                p_o = p_out + i_row * s_out_row + i_k * G * s_out_head
                write(p_o, p_lse2 + i_row * s_lse_row + i_k * G, out, lse2, s_out_head, o_g, o_d, G, D)
        unit = segment_end


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is split: tokens of a block, warps of a program, stages of its pipeline,
    programs on an SM."""

    block: int
    warps: int
    stages: int
    per_sm: int

    def options(self) -> list[dict]:
        """How to launch the kernel, for `launch.launch`. Without a limit ptxas may spill so that more programs fit on an SM
        than are launched. Where the highest limit spills too, a shorter pipeline or more threads need fewer registers."""
        most, short = REGISTER_LIMITS[-1], max(self.stages - 1, min(self.stages, 3))
        return [
            {"num_warps": warps, "STAGES": stages, "num_stages": stages, "maxnreg": limit}
            for warps, stages, limit in (
                (self.warps, self.stages, None), (self.warps, self.stages, most),
                (self.warps, short, most), (max(self.warps, 8), short, most),
            )
        ]  # fmt: skip

    @classmethod
    def default(cls, head_size: int, dtype: torch.dtype, group: int, shared: int = 227 << 10) -> "Tuning":
        """shared: bytes of shared memory of an SM that programs may use.

        Page numbers and KV are loaded one after the other, so that `stages` hold `stages - 2`
        blocks of KV. Blocks of 32 KB measured best: 64 tokens of head size 128.
        """
        width = power_of_two(head_size)
        # The outputs of larger groups leave four warps too few registers for the rest.
        warps = 4 if power_of_two(group) * width <= 2048 else 8
        token = 2 * width * dtype.itemsize
        block, stages = max((32 << 10) // token, 16), 5

        def needed() -> int:
            return (stages - 2) * block * token + (12 << 10)

        while needed() > shared and (block > 16 or stages > 3):
            stages, block = (stages - 1, block) if stages > 3 else (5, block // 2)
        return cls(block, warps, stages, per_sm=2 if 2 * needed() <= shared and warps == 4 else 1)


class TritonExact:
    """Exact prefix attention of missed groups by `prefix_kernel`. One object serves all layers.

    Buffers are allocated here. `attend` and `finish` allocate nothing and wait for nothing, so both may be
    captured in a CUDA graph. Calls that share an object must not overlap.
    """

    whole_rows, all_triton, plans_on_host = True, True, False
    OF_HITS = False

    def __init__(self, geometry: Geometry, device, programs: int | None = None, tuning: Tuning | None = None):
        """programs: how many share the work; by default as many as the device holds at once."""
        self.geometry = geometry
        limits, sms, self.pdl = {}, 4, False
        if torch.device(device).type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            sms = properties.multi_processor_count
            limits = {"shared": properties.shared_memory_per_block_optin}
            # Programmatic dependent launch, as in `hit` and `complete`.
            self.pdl = properties.major >= 9
        self.tuning = tuning or Tuning.default(geometry.head_size, geometry.dtype, geometry.group, **limits)
        self.programs = programs = programs or sms * self.tuning.per_sm
        # Triton's interpreter multiplies the bits of bf16 numbers; GPUs take KV's own type. This goes with `partial`'s.
        self._dot = tl.float32 if triton.knobs.runtime.interpret else _DOT_TYPES[geometry.dtype]
        # Merging in blocks of about the square root of the programs makes two short steps of it;
        # the kernel merges at most twice this many at once.
        self._block = 2
        while self._block * (2 * self._block - 2) < programs:
            self._block *= 2
        slots = 2 * programs * geometry.group
        self._part_out = torch.empty(slots, geometry.head_size, dtype=torch.float32, device=device)
        self._part_lse = torch.empty(slots, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(4 * programs, dtype=torch.int32, device=device)
        self._options = self.tuning.options()
        self._found: dict = {}  # the option chosen for each variant of the kernel

    def lasting(self) -> dict[str, Tensor]:
        """By name, what a launch must find as the one before left it: the counters of arrival, all 0."""
        return {"misses_arrived": self._arrived}

    def begin_step(self, rows: Rows, kv: Tensor) -> None:
        """Nothing is prepared."""

    def attend(self, rows: Rows, query: Tensor, kv: Tensor, hit: Tensor, out: Tensor, lse: Tensor) -> None:
        """Attention of missed groups over `[prefix_start, m+1-band)`; `(0, -inf)` everywhere else.

        rows: position and block_table are read. query: `[B, H, D]` after RoPE. kv: `[blocks, K, page, 2 D]`, any
        strides but the last, which is 1. hit: `[B, K]` int32, contiguous, nonzero where a group hit.
        Writes out `[B, H, D]` (any float dtype) and lse `[B, H]` float32, **base 2**.

        Raises ValueError where there are more rows than `max_rows`.
        """
        self._launch(rows, query, kv, hit, dict(p_out=out, p_lse2=lse), {})

    def finish(self, layer: LayerState, rows: Rows, query: Tensor, kv: Tensor, work: Workspace, out: Tensor) -> None:
        """Compute, complete and record the groups that `decode_hits` left open. See `decoder.MissEngine.finish`."""
        store, cos_sin = layer.store, layer.rotary.cos_sin
        pointers = dict(
            p_out=out, p_lse2=None, p_ring=rows.ring, p_cos_sin=cos_sin,
            p_part_out=work.part_out, p_part_lse=work.part_lse,
            p_ring_query=store.query, p_ring_out=store.out, p_ring_lse=store.lse, p_ring_chain=store.chain,
        )  # fmt: skip
        rotary = 0 if cos_sin is None else cos_sin.shape[-1]
        constants = dict(W=store.window, ROTARY=rotary, NEOX=layer.rotary.is_neox, SINK=self.geometry.sink)
        self._launch(rows, query, kv, work.hit, pointers, constants)

    def _launch(self, rows: Rows, query: Tensor, kv: Tensor, hit: Tensor, results: dict, completion: dict) -> None:
        """results: the pointers that `attend` and `finish` differ in. completion: constants that `finish` adds."""
        g, t, count = self.geometry, self.tuning, len(query)
        if count > g.max_rows:
            raise ValueError(f"query: {count} rows, choose at most max_rows ({g.max_rows})")
        groups = count * g.kv_heads
        heads, width = power_of_two(g.group), power_of_two(g.head_size)
        out, lse = results["p_out"], results["p_lse2"]
        s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
        pointers = dict(
            p_query=query, p_kv=kv, p_table=rows.block_table, p_position=rows.position, p_hit=hit, **results,
        )  # fmt: skip
        sizes = dict(
            first_token=g.prefix_start, band=g.band, s_query_row=s_query[0], s_query_head=s_query[1],
            s_kv_page=s_kv[0], s_kv_head=s_kv[1], s_kv_token=s_kv[2], s_out_row=s_out[0], s_out_head=s_out[1],
            s_lse_row=0 if lse is None else lse.stride(0),
        )  # fmt: skip
        others = dict(
            p_split_out=self._part_out, p_split_lse2=self._part_lse, p_arrived=self._arrived,
            groups=groups, s_table_row=rows.block_table.stride(0), log2_scale=g.scale * LOG2_E.value,
        )  # fmt: skip
        constants = dict(
            K=g.kv_heads, G=g.group, D=g.head_size, PAGE=g.page_size,
            BN=t.block, BQ=max(16, heads), BG=heads, BD=width, BBK=max(16, power_of_two(groups)),
            MERGE=self._block, UNROLL=max(1, min(8, 4096 // (heads * width))),
            DOT=self._dot, PDL=self.pdl, OF_HITS=self.OF_HITS,
            **completion, **({"launch_pdl": True} if self.pdl else {}),
        )  # fmt: skip
        launch(prefix_kernel, (self.programs,), pointers, sizes, others, constants, self._options, self._found)


class ExactHits(TritonExact):
    """Exact attention of the groups that hit, for audits: the other groups are those that `TritonExact` computes.

    With `band` and `sink` 0 in the geometry, attention is over all tokens of a row.
    """

    OF_HITS = True

    def __init__(self, geometry: Geometry, device):
        super().__init__(geometry, device)
        self._lse = torch.empty(geometry.max_rows, geometry.heads, dtype=torch.float32, device=device)

    def finish(self, layer: LayerState, rows: Rows, query: Tensor, kv: Tensor, work: Workspace, out: Tensor) -> None:
        """Write the exact attention of groups that hit to out `[B, H, D]`, any float dtype, and 0 for the others."""
        count = len(query)
        self.attend(rows, query, kv, work.hit[:count], out, self._lse[:count])
