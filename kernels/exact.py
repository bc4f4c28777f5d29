"""Exact attention over the prefix of the missed (row, KV head) groups, in one launch.

One of two engines for misses; `flashinfer_exact.FlashInferExact` is the other. Both attend alike, and the
oracle of both is `paged.attend` over `[lo, m+1-band)`. This one can also complete the groups
(`complete.complete_group`), so that no other launch need follow.

Letters: `B` rows, `H` query heads, `K` KV heads, `G = H / K`, `D` head size. Positions are
0-based and intervals half-open. **LSE base 2.** Variables: `i_` index, `o_` offsets of a
block, `b_` block in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_mac.kernels.amend import LOG2_E
from vllm_mac.kernels.hit import Workspace
from vllm_mac.kernels.prefix import prefix_kernel
from vllm_mac.kernels.registers import REGISTERS, launch, power_of_two

_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class PrefixProblem:
    """What is the same in every layer and every step, for both engines.

    max_rows: most rows of a batch. max_blocks: most KV pages of one row. dtype: of queries and
    KV. scale: multiplies the scores. The prefix of position `m` is `[first, m+1-band)`, where
    `first` is `sink` rounded up to a whole page, so that it can begin at a page.
    """

    max_rows: int
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    max_blocks: int
    dtype: torch.dtype
    band: int
    sink: int
    scale: float

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads}, choose a multiple of kv_heads ({self.kv_heads})")
        if self.dtype not in _DOT_TYPES:
            raise ValueError(f"dtype: {self.dtype}, choose one of {list(_DOT_TYPES)}")

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def first(self) -> int:
        return -(-self.sink // self.page_size) * self.page_size


@dataclass(frozen=True, slots=True)
class Completion:
    """What `TritonExact.run` needs to complete the groups that `hit.decode_hits` left open.

    ring: `[B]`, as for `decode_hits`. work: the `hit.Workspace` that it used, with `whole` true. store:
    the layer's rings (`ring.RingStore`). cos_sin, is_neox: as for `decode_hits`.
    """

    ring: Tensor
    work: Workspace
    store: object
    cos_sin: Tensor | None = None
    is_neox: bool = True

    def pointers(self) -> dict:
        store, work = self.store, self.work
        return dict(
            ring=self.ring, cos_sin=self.cos_sin, left_out=work.part_out, left_lse=work.part_lse,
            ring_query=store.query, ring_out=store.out, ring_lse=store.lse, ring_chain=store.chain,
        )  # fmt: skip

    def constants(self) -> dict:
        rotary = 0 if self.cos_sin is None else self.cos_sin.shape[-1]
        return dict(W=self.store.query.shape[2], ROTARY=rotary, NEOX=self.is_neox)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel is cut: tokens of a block, warps of a program, stages of its pipeline,
    programs on a multiprocessor."""

    block: int
    warps: int
    stages: int
    per_sm: int

    def options(self) -> list[dict]:
        """How to launch the kernel, for `registers.launch`: ptxas may also keep registers in memory for the sake of more
        programs than there are; otherwise a shorter pipeline or more threads have enough of them."""
        most, short = REGISTERS[-1], max(self.stages - 1, min(self.stages, 3))
        return [
            {"num_warps": warps, "STAGES": stages, "num_stages": stages, "maxnreg": limit}
            for warps, stages, limit in (
                (self.warps, self.stages, None), (self.warps, self.stages, most),
                (self.warps, short, most), (max(self.warps, 8), short, most),
            )
        ]  # fmt: skip

    @classmethod
    def default(cls, head_size: int, dtype: torch.dtype, group: int, shared: int = 227 << 10) -> "Tuning":
        """shared: bytes of shared memory that a program, or several together, may have.

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

    Buffers are allocated here; `run` allocates nothing and waits for nothing, so it may be
    captured in a CUDA graph. Calls that share an object must not overlap.
    """

    def __init__(
        self,
        problem: PrefixProblem,
        device,
        programs: int | None = None,
        tuning: Tuning | None = None,
        of_hits: bool = False,
    ):
        """programs: how many share the work; by default as many as the device holds at once.
        of_hits: attend for the groups that hit instead of those that missed."""
        self.problem, self.of_hits = problem, of_hits
        limits, sms, self.pdl = {}, 4, False
        if torch.device(device).type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            sms = properties.multi_processor_count
            limits = {"shared": properties.shared_memory_per_block_optin}
            # Programmatic dependent launch, as in `hit` and `complete`.
            self.pdl = properties.major >= 9
        self.tuning = tuning or Tuning.default(problem.head_size, problem.dtype, problem.group, **limits)
        self.programs = programs = programs or sms * self.tuning.per_sm
        # Triton's interpreter multiplies the bits of bf16 numbers; GPUs take KV's own type.
        self._dot = tl.float32 if triton.knobs.runtime.interpret else _DOT_TYPES[problem.dtype]
        # Merging in blocks of about the square root of the programs makes two short steps of it;
        # the kernel merges at most twice this many at once.
        self._block = 2
        while self._block * (2 * self._block - 2) < programs:
            self._block *= 2
        slots = 2 * programs * problem.group
        self._part_out = torch.empty(slots, problem.head_size, dtype=torch.float32, device=device)
        self._part_lse = torch.empty(slots, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(4 * programs, dtype=torch.int32, device=device)
        self._options = self.tuning.options()
        self._found: dict = {}  # which of them each variant of the kernel takes

    def lasting(self) -> dict[str, Tensor]:
        """By name, what a launch must find as the one before left it: the counters of arrival, all 0."""
        return {"misses_arrived": self._arrived}

    def begin_step(self, block_table: Tensor, position: Tensor, kv: Tensor) -> None:
        """Once a step, before the layers. This engine has nothing to prepare."""

    def run(
        self,
        query: Tensor,
        kv: Tensor,
        block_table: Tensor,
        position: Tensor,
        hit: Tensor,
        out: Tensor,
        lse: Tensor | None,
        completion: Completion | None = None,
    ) -> None:
        """Attention of missed groups over `[first, m+1-band)`; `(0, -inf)` everywhere else.

        query: `[B, H, D]` after RoPE. kv: `[blocks, K, page, 2 D]`, any strides but the last,
        which is 1. block_table: `[B, *]` int32. position: `[B]` int32, `m`, or -1 for a padded
        row. hit: `[B, K]` int32, contiguous, nonzero where nothing is to be read, or with `of_hits`
        where something is. Writes out `[B, H, D]` (any float dtype) and lse `[B, H]` float32,
        **base 2**.

        With a completion, out is the layer's output in query's dtype, written for missed groups only
        (as `complete.complete_misses` does, which is then not to be called), and lse is not written.
        """
        rows = len(query)
        if rows > self.problem.max_rows:
            raise ValueError(f"query: {rows} rows, choose at most max_rows ({self.problem.max_rows})")
        p, t = self.problem, self.tuning
        groups = rows * p.kv_heads
        heads, width = power_of_two(p.group), power_of_two(p.head_size)
        s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
        pointers = dict(
            query=query, kv=kv, block_table=block_table, position=position, hit=hit, out=out, lse=lse,
            **({} if completion is None else completion.pointers()),
        )  # fmt: skip
        sizes = dict(
            first_token=p.first, band=p.band, stride_qb=s_query[0], stride_qh=s_query[1],
            stride_page=s_kv[0], stride_head=s_kv[1], stride_token=s_kv[2], stride_ob=s_out[0], stride_oh=s_out[1],
            stride_lb=0 if lse is None else lse.stride(0),
        )  # fmt: skip
        others = dict(
            part_out=self._part_out, part_lse=self._part_lse, arrived=self._arrived,
            groups=groups, stride_table=block_table.stride(0), scale_log2=p.scale * LOG2_E.value,
        )  # fmt: skip
        constants = dict(
            K=p.kv_heads, G=p.group, D=p.head_size, PAGE=p.page_size,
            BN=t.block, BG=max(16, heads), BM=heads, BD=width, BR=max(16, power_of_two(groups)),
            P=self._block, UNROLL=max(1, min(8, 4096 // (heads * width))),
            DOT=self._dot, PDL=self.pdl, OF_HITS=self.of_hits,
            **({} if completion is None else {**completion.constants(), "SINK": p.sink}),
            **({"launch_pdl": True} if self.pdl else {}),
        )  # fmt: skip
        launch(prefix_kernel, (self.programs,), pointers, sizes, others, constants, self._options, self._found)
