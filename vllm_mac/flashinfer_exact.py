"""Exact prefix attention of missed groups by FlashInfer's tensor-core decode.

`FlashInferExact` is one of the two miss engines (`decoder.MissEngine`); `kernels.exact.TritonExact` is the other. It
computes the prefix into buffers of its own, and `kernels.complete.complete_misses` completes the groups.

FlashInfer gets one virtual request per (row, KV head), so that hit or miss can differ per KV head. In CUDA-graph
mode it reads its list of work from device memory, and `kernels.plan` writes that list there: no planning on
the host, no synchronisation, and misses cost what their bytes cost.

The format of the list is no public interface of FlashInfer. A trial at start-up compares a small problem with
PyTorch. Where it fails, every step is planned on the host through FlashInfer's public interface, all groups are
computed, and one warning says so.
"""

import logging
import math

import torch
from torch import Tensor

from vllm_mac.kernels.complete import complete_misses
from vllm_mac.kernels.plan import Plan, capacity, write_pages, write_plan
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.state import Geometry, LayerState, Rows

logger = logging.getLogger(__name__)

# Order of FlashInfer's PrefillPlanInfo (include/flashinfer/attention/scheduler.cuh, 0.7.0.post1).
_PLAN_INFO = (
    "padded_batch_size", "total_num_rows", "total_num_rows_offset", "cta_tile_q",
    "request_indices_offset",
    "qo_tile_indices_offset", "kv_tile_indices_offset", "merge_indptr_offset", "o_indptr_offset",
    "kv_chunk_size_ptr_offset", "v_offset", "s_offset", "block_valid_mask_offset",
    "enable_cuda_graph", "split_kv",
)  # fmt: skip


class FlashInferExact:
    """One object serves all layers whose KV caches have the same strides.

    Buffers are allocated here. `attend` and `finish` allocate nothing and wait for nothing, so both may be captured
    in a CUDA graph; `begin_step` writes persistent buffers and may be called outside the graph.
    """

    whole_rows, all_triton = False, False

    def __init__(self, geometry: Geometry, device, check: bool = True):
        """check: try the plan that the device writes, and keep to the public interface where it fails."""
        import flashinfer

        if geometry.head_size not in (64, 128, 256):
            raise ValueError(f"head_size: {geometry.head_size}, FlashInfer decodes 64, 128 and 256")
        if geometry.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: {geometry.dtype}, FlashInfer decodes torch.bfloat16 and torch.float16")
        self.geometry, self.device = geometry, torch.device(device)
        self._wrapper_class = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        groups, group = geometry.max_rows * geometry.kv_heads, geometry.group
        # FlashInfer keeps two thread blocks on a multiprocessor.
        properties = torch.cuda.get_device_properties(self.device)
        self._slots = 2 * properties.multi_processor_count
        self._pdl = properties.major >= 9

        def ints(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int32, device=self.device)

        self._indices = ints(groups * geometry.max_blocks)
        self._indptr, self._last_page_len = ints(groups + 1), ints(groups)
        shape = geometry.max_rows, geometry.heads, geometry.head_size
        self._query, self._prefix_out = torch.empty(2, *shape, dtype=geometry.dtype, device=self.device)
        self._prefix_lse = torch.empty(shape[:2], dtype=torch.float32, device=self.device)
        # Elements between virtual pages, and how many of these a block and a head are apart.
        self._unit: tuple[int, int, int] | None = None
        self._public: dict[int, object] | None = None

        tiles = capacity(groups, self._slots)
        values = tiles * group * geometry.head_size * 4
        workspace = torch.zeros(values + tiles * group * 4 + 16, dtype=torch.uint8, device=self.device)
        try:
            self._open(workspace, groups, tiles, values)
            if check:
                self._check()
        except Exception as error:
            logger.warning(
                "MAC: FlashInfer %s does not take a plan written on the device (%s: %s). Misses "
                "are planned on the host in every step and all KV heads are read, hit or not; "
                "miss_engine 'triton' avoids both.",
                getattr(flashinfer, "__version__", "?"), type(error).__name__, error,
            )  # fmt: skip
            self._open_public(groups)

    @property
    def device_planned(self) -> bool:
        """Whether the plan is written on the device (else: the public path)."""
        return self._public is None

    def lasting(self) -> dict[str, Tensor]:
        """By name, what every step must find as it was made: the part of a plan that is the same in all of them."""
        return {"query_tiles": self._plan.qo_tile_indices} if self.device_planned else {}

    @property
    def plans_on_host(self) -> bool:
        return not self.device_planned

    def begin_step(self, rows: Rows, kv: Tensor) -> None:
        """Once a step, before its layers: the page table of the virtual requests. kv: any layer's cache.

        Nothing here waits for the device, except on the public path, which plans on the host.
        Raises ValueError for more rows than `max_rows`, and for strides that cannot be split into heads.
        """
        g, count = self.geometry, len(rows.position)
        if count > g.max_rows:
            raise ValueError(f"position: {count} rows, choose at most max_rows ({g.max_rows})")
        self._unit = self._virtual_strides(kv)
        _, block_pages, head_pages = self._unit
        write_pages(rows, g, self._indices, self._indptr, self._last_page_len, block_pages, head_pages)
        if self._public is not None:
            self._plan_public(count * g.kv_heads)

    def finish(self, layer: LayerState, rows: Rows, query: Tensor, kv: Tensor, work: Workspace, out: Tensor) -> None:
        """See `decoder.MissEngine.finish`."""
        n = len(query)
        prefix_out, prefix_lse = self._prefix_out[:n], self._prefix_lse[:n]
        self.attend(rows, query, kv, work.hit[:n], prefix_out, prefix_lse)
        complete_misses(layer, rows, query, prefix_out, prefix_lse, work, out)

    def attend(self, rows: Rows, query: Tensor, kv: Tensor, hit: Tensor, out: Tensor, lse: Tensor) -> None:
        """Attention of missed groups over `[prefix_start, m+1-band)`; `(0, -inf)` everywhere else.

        rows: those of `begin_step`. query: `[B, H, D]` after RoPE. kv: `[blocks, K, page, 2 D]`, strides as given to
        `begin_step`. hit: `[B, K]` int32, contiguous, nonzero where a group hit. Writes out `[B, H, D]`, contiguous,
        in query's dtype, and lse `[B, H]` float32, contiguous, **base 2**.

        Raises ValueError where `kv`, `out` or `lse` are not so.
        """
        g, count = self.geometry, query.shape[0]
        if self._virtual_strides(kv) != self._unit:
            raise ValueError(f"kv: strides {kv.stride()} differ from those given to begin_step")
        if out.dtype != g.dtype or not out.is_contiguous() or not lse.is_contiguous():
            raise ValueError(f"out: {out.dtype}, strides {out.stride()}, choose {g.dtype}, contiguous, as lse")
        if query.stride(0) != g.heads * query.stride(1):
            query = self._query[:count].copy_(query)
        groups = count * g.kv_heads
        if self._public is None:
            write_plan(rows, g, hit, self._plan, self._slots, self._pdl)
            wrapper = self._wrapper
            wrapper._paged_kv_indptr_buf = self._indptr[: groups + 1]
            wrapper._paged_kv_last_page_len_buf = self._last_page_len[:groups]
            wrapper._plan_info = self._plan_info(groups)
        else:
            wrapper = self._public[groups]
        wrapper.run(
            query.view(groups, g.group, g.head_size), self._virtual(kv),
            out=out.view(groups, g.group, g.head_size), lse=lse.view(groups, g.group),
            return_lse=True,
            # FlashInfer reads the plan before it waits for the kernel in front of it.
            enable_pdl=False,
        )  # fmt: skip
        if self._public is not None:
            skip = (hit != 0) | (rows.position[:, None] + 1 - g.band <= g.prefix_start)
            skip = skip.repeat_interleave(g.group, 1)
            out.masked_fill_(skip[..., None], 0.0)
            lse.masked_fill_(skip, -math.inf)

    def _open(self, workspace: Tensor, groups: int, tiles: int, values: int) -> None:
        """The wrapper, and FlashInfer's own plan as a template of ours."""
        self._wrapper = self._new_wrapper(workspace, groups)
        one_page = torch.arange(groups + 1, dtype=torch.int32)
        # Without splitting this plan needs no workspace; ours splits.
        self._plan_wrapper(self._wrapper, one_page, torch.ones(groups, dtype=torch.int32), disable_split_kv=True)
        info = dict(zip(_PLAN_INFO, (int(x) for x in self._wrapper._plan_info), strict=True))
        expected = {"total_num_rows": groups, "enable_cuda_graph": 1, "split_kv": 0}
        if any(info[name] != value for name, value in expected.items()) or info["cta_tile_q"] not in (16, 64, 128):
            raise RuntimeError(f"unexpected plan {info}")
        self._plan = Plan.in_buffer(self._wrapper._int_workspace_buffer, groups, tiles)
        at = self._plan.offset
        self._info = info | {
            "total_num_rows_offset": at["total_rows"],
            "request_indices_offset": at["request_indices"],
            "qo_tile_indices_offset": at["qo_tile_indices"],
            "kv_tile_indices_offset": at["kv_tile_indices"],
            "merge_indptr_offset": at["indptr"], "o_indptr_offset": at["indptr"],
            "kv_chunk_size_ptr_offset": at["chunk_size"], "v_offset": 0, "s_offset": values,
            "block_valid_mask_offset": at["valid"], "split_kv": 1,
        }  # fmt: skip

    def _plan_info(self, groups: int) -> list[int]:
        info = self._info | {
            "padded_batch_size": capacity(groups, self._slots),
            "total_num_rows": groups,
        }
        return [info[name] for name in _PLAN_INFO]

    def _new_wrapper(self, workspace: Tensor, groups: int):
        return self._wrapper_class(
            workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True,
            paged_kv_indptr_buffer=self._indptr[: groups + 1],
            paged_kv_indices_buffer=self._indices,
            paged_kv_last_page_len_buffer=self._last_page_len[:groups],
        )  # fmt: skip

    def _plan_wrapper(self, wrapper, indptr: Tensor, last_page_len: Tensor, **options) -> None:
        g = self.geometry
        wrapper.plan(
            indptr, self._indices[:0], last_page_len, g.group, 1, g.head_size, g.page_size,
            q_data_type=g.dtype, kv_data_type=g.dtype, sm_scale=g.scale, **options,
        )  # fmt: skip

    def _open_public(self, groups: int) -> None:
        g = self.geometry
        rows = groups * g.group
        tile_q = 16 if g.group <= 16 else 64
        tiles = max(self._slots, -(-rows // tile_q) + groups)
        size = g.group * tiles * tile_q * (g.head_size + 1) * 4 + (1 << 20)
        self._public_workspace = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._public = {}

    def _plan_public(self, groups: int) -> None:
        if groups not in self._public:
            self._public[groups] = self._new_wrapper(self._public_workspace, groups)
        self._plan_wrapper(self._public[groups], self._indptr[: groups + 1], self._last_page_len[:groups])

    def _virtual_strides(self, kv: Tensor) -> tuple[int, int, int]:
        """What `_unit` holds, of this layer's cache."""
        block, head = kv.stride(0), kv.stride(1) if kv.shape[1] > 1 else kv.stride(0)
        unit = math.gcd(block, head)
        if unit * kv.itemsize % 16 or kv.shape[0] * (block // unit) >= 1 << 31 or kv.stride(3) != 1:
            raise ValueError(f"kv: strides {kv.stride()} with {kv.shape[0]} blocks cannot be split into heads")
        return unit, block // unit, head // unit

    def _virtual(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as caches of one KV head, `[virtual pages, page, 1, D]`."""
        d = self.geometry.head_size
        unit, block_pages, head_pages = self._unit
        pages = (kv.shape[0] - 1) * block_pages + (kv.shape[1] - 1) * head_pages + 1
        size, stride = (pages, kv.shape[2], 1, d), (unit, kv.stride(2), d, 1)
        key = kv.as_strided(size, stride, kv.storage_offset())
        return key, kv.as_strided(size, stride, kv.storage_offset() + d)

    def _check(self) -> None:
        """Compare a small problem with PyTorch; raises where they differ."""
        g = self.geometry
        rows = min(3, g.max_rows)
        tokens = min(g.max_blocks * g.page_size, g.prefix_start + g.band + 1000)
        blocks = -(-tokens // g.page_size)
        draw = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float32, device=self.device).to(g.dtype)

        kv = normal(rows * blocks + 1, g.page_size, g.kv_heads, 2 * g.head_size).transpose(1, 2)
        query = normal(rows, g.heads, g.head_size)
        table = torch.randperm(rows * blocks, generator=draw, device=self.device).view(rows, blocks).int() + 1
        position = torch.tensor([tokens - 1, -1, tokens // 2], dtype=torch.int32, device=self.device)[:rows]
        hit = (torch.arange(rows * g.kv_heads, device=self.device) % 3 == 2).int().view(rows, g.kv_heads)
        out = torch.full_like(query, math.nan)
        lse = torch.full((rows, g.heads), math.nan, dtype=torch.float32, device=self.device)
        held = Rows(position, position, position, position, table)  # of which only position and table are read
        self.begin_step(held, kv)
        self.attend(held, query, kv, hit, out, lse)
        for row in range(rows):
            end = max(int(position[row]) + 1 - g.band, g.prefix_start)
            part = kv[table[row].long()].transpose(1, 2).flatten(0, 1)[g.prefix_start : end].float()  # [T, K, 2 D]
            key, value = part.transpose(0, 1).chunk(2, -1)
            score = query[row].float().view(g.kv_heads, g.group, -1) @ key.transpose(1, 2) * g.scale  # [K, G, T]
            score = score.masked_fill(hit[row].bool()[:, None, None], -math.inf)
            expected_lse = torch.logsumexp(score, -1)
            weight = torch.exp(score - torch.where(expected_lse == -math.inf, 0.0, expected_lse)[..., None])
            error = (out[row].float().view_as(weight @ value) - weight @ value).norm()
            # bf16 keeps 8 bits: weights and partial results are each rounded once.
            if not error <= 2.0**-6 * (weight @ value).norm() + 1e-6:
                raise RuntimeError(f"its result is off by {float(error):.3g} in a trial")
            if not torch.allclose(lse[row].view_as(expected_lse) * math.log(2), expected_lse, atol=1e-3, rtol=1e-4):
                raise RuntimeError("its log-sum-exp is off in a trial")
