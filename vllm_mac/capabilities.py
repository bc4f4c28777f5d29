"""MAC's answer to each question that vLLM asks an attention backend, and the reason for it.

A backend, its layers' implementation and its metadata builder tell vLLM by attributes and methods what they
can do. MAC's classes inherit those of a platform's own backend, and an unnoticed True would be an unchecked
promise. So there is one line here for each name, and the tests compare the names with the sources
of every supported vLLM: a name that a later version adds has to be decided here first.

vLLM also treats some backends by name. What it does for "FLASHINFER" (no prefix cache where results must not
depend on the batch; a warm-up of FlashInfer's kernels) "MAC" neither gets nor needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_mac.plugin import NAME

_NOTHING = object()

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
# By index on GPUs these too: FP8 with 4 bits of exponent, one scale for all keys of a layer and one for its values.
FP8_DTYPES = ("fp8", "fp8_e4m3")
ATTENTION_TYPES = ("decoder",)
# What --block-size has to be a multiple of: the smallest page that the platform's kernels read.
BLOCK_SIZES = {"cpu": 32, "cuda": 16}
# The same with `rule: index`: pages that it pads are read whole. On GPUs they divide its tiles and spans of tokens.
INDEX_BLOCK_SIZES = {"cpu": (32, 64, 128, 256), "cuda": (16, 32, 64)}
# What VLLM_KV_CACHE_LAYOUT may be with `rule: index`: pages in one part, and those of other layers not between them.
INDEX_LAYOUTS = ("LBNHC", "LBHNC", "NHD", "HND")
# What to do where no index can be: its users need not know that they chose one.
TO_MATCH = """set rule: match, as in --additional-config '{"mac": {"rule": "match"}}' (rule: index is the default)"""
# Compute capabilities.
GPUS_FROM, FLOAT8_FROM, INDEX_BEFORE = (8, 0), (8, 9), (10, 0)


@dataclass(frozen=True, slots=True)
class Decision:
    """because: in a few words; for what is refused, those that the user reads.
    pinned: the value of MAC's class under the name, whatever the platform's is; `_NOTHING` where the class body
        defines it, or where it is inherited (`inherited`).
    asked: the parameter of `validate_configuration` by which vLLM asks whether a user's choice is supported.
    cure: what the user does about it; None where it is the model's own.
    """

    because: str
    pinned: Any = _NOTHING
    inherited: bool = False
    asked: str | None = None
    cure: str | None = None


def platform(because: str) -> Decision:
    """The platform's own answer is right for MAC too, whatever it is."""
    return Decision(because, inherited=True)


def own(because: str) -> Decision:
    """MAC's classes define the answer (on one platform at least; on the other the platform's answer is right)."""
    return Decision(because)


def refused(because: str, asked: str | None = None, cure: str | None = None) -> Decision:
    """A method of the backend's class, False."""
    return Decision(because, classmethod(lambda cls: False), asked=asked, cure=cure)


def lacking(because: str) -> Decision:
    """An attribute, False."""
    return Decision(because, False)


def never(because: str) -> Decision:
    """A method of an object, False."""
    return Decision(because, lambda self, *_: False)


_SHARDS = "each rank holds a part of a request's keys, and a ring's summaries are of all of them"
_FUSED = "such a kernel writes keys and values as the platform lays them out, and hides the query from MAC"
_EXACT = "such layers are exact: the platform's own to run"

BACKEND = {
    "customize_spec": own("makes room for the index of keys"),
    "forward_includes_kv_cache_update": lacking(
        "keys and values are written before forward, which reads the cache alone"
    ),
    "full_cls_name": platform("names the class"),
    "get_builder_cls": own("names MAC's class"),
    "get_dtype_for_flashinfer": platform("of quantised KV caches"),
    "get_impl_cls": own("names MAC's class"),
    "get_name": own("MAC"),
    "get_preferred_block_size": own("the index has one mean value a page, so pages should not be small"),
    "get_supported_head_sizes": platform("what the platform runs and MAC does not is exact"),
    "get_supported_kernel_block_sizes": own("pages beyond 64 are read by kernels that return no LSE only"),
    "is_mla": platform("no"),
    "is_sparse": platform("no"),
    "is_ssm": platform("no"),
    "supported_dtypes": platform("MAC's kernels take them all"),
    "supported_kv_cache_dtypes": own("MAC's kernels read unquantised keys and values, by index on GPUs FP8 too"),
    "supported_kv_cache_layouts": platform("MAC's kernels take any strides"),
    "supports_alibi_sqrt": platform(_EXACT),
    "supports_attn_type": own("rings are of decoders"),
    "supports_batch_invariance": refused(
        "how a row's work is cut up depends on the rows beside it", "use_batch_invariant", "unset VLLM_BATCH_INVARIANT"
    ),
    "supports_block_size": platform("follows the block sizes"),
    "supports_combination": own("names the KV cache's dtype in its reason"),
    "supports_compute_capability": platform("MAC's kernels compile for all of them"),
    "supports_dcp": refused(_SHARDS, "use_dcp", "leave out --decode-context-parallel-size"),
    "supports_device_cpu_query_lens_mismatch": refused(
        "decodes are distinguished from prefills by the query lengths that the host knows",
        "use_adaptive_verification",
        "leave enable_adaptive_verification out of --speculative-config",
    ),
    "supports_dtype": platform("MAC's kernels take them all"),
    "supports_head_size": platform("what the platform runs and MAC does not is exact"),
    "supports_kv_cache_dtype": own("MAC's kernels read unquantised keys and values, by index on GPUs FP8 too"),
    "supports_kv_cache_update_bypass": platform("forward reads the cache alone, in the platform's layout on GPUs"),
    "supports_kv_connector": own("with rule: index, connectors that copy pages with room behind their keys and values"),
    "supports_mm_prefix": refused(
        "tokens of an image attend to later ones, and a ring's summaries do not", "use_mm_prefix"
    ),
    "supports_non_causal": refused(
        "a ring's summaries end before the query", "use_non_causal", "leave out --attention-config.use_non_causal"
    ),
    "supports_non_causal_dcp": refused(_SHARDS),
    "supports_pcp": refused(_SHARDS, "use_pcp", "leave out --prefill-context-parallel-size"),
    "supports_per_head_quant_scales": refused(
        "MAC's kernels take one scale for a layer's keys and one for its values", "use_per_head_quant_scales"
    ),
    "supports_rswa": refused(
        "a query sees a window and the prompt, and a ring's summaries are of all between", "use_rswa"
    ),
    "supports_sink": own(_EXACT + "; vLLM's backend for CPUs runs them without saying so"),
    "supports_sliding_window": platform(_EXACT),
    "validate_configuration": own("adds the reasons of this table"),
}

IMPL = {
    "can_return_lse_for_decode": lacking("what MAC computes of a row without a ring is completed in one launch"),
    "do_kv_cache_update": own("MAC reads plain rows on CPUs, and indexes keys that are written"),
    "do_qk_norm_mrope_kvcache_update": platform("never called"),
    "do_qk_norm_rope_kvcache_update": platform("never called"),
    "do_rope_and_kv_cache_update": platform("never called"),
    "forward": own("the method"),
    "fused_output_quant_supported": never("outputs are written in the query's dtype"),
    "fused_qk_norm_mrope_kvcache_supported": never(_FUSED),
    "fused_qk_norm_rope_kvcache_supported": never(_FUSED),
    "fused_rope_kvcache_supported": never(_FUSED),
    "get_impl_variants": platform("there is one"),
    "get_xqa_bmm1_scale": platform("of exact layers"),
    "is_sparse": platform("no"),
    "kv_quant_mode": platform("of the KV cache"),
    "lse_base_on_e": platform("no caller gets an LSE"),
    "maybe_quant_query": platform("of exact layers"),
    "need_to_return_lse_for_decode": platform("follows can_return_lse_for_decode"),
    "prepare_for_batch": platform("nothing to prepare"),
    "process_weights_after_loading": own("settles the layers"),
    "set_interleaved_v_cache": never(_FUSED),
    "supports_dcp": lacking(_SHARDS),
    "supports_dense_mha_prefill": platform("of MLA"),
    "supports_mtp_with_cp_non_trivial_interleave_size": lacking(_SHARDS),
    "supports_pcp": lacking(_SHARDS),
    "supports_quant_query_input": lacking("MAC's kernels read queries in the model's dtype"),
}

BUILDER = {
    "build": own("plans MAC's steps"),
    "build_for_cudagraph_capture": own("records graphs over rows that do nothing"),
    "build_for_drafting": own("a draft model's layers are exact, and no ring may count what only they read"),
    "get_cudagraph_support": own(
        "graphs are of steps that decode one token a row, by index also of those that verify some"
    ),
    "get_q_data_type": platform("with quantised KV caches only"),
    "get_varlen_cudagraph_max_query_len": own("vLLM asks for adaptive verification only, which is refused"),
    "kv_cache_layout": platform("MAC's kernels take any strides"),
    "reorder_batch_threshold": own(
        "rows that decode come first: of one token, by index of as many as speculation verifies"
    ),
    "requires_block_table_width": platform("for the platform's own use"),
    "set_workspace_buffer": platform("for the platform's own use"),
    "supports_draft_decode_metadata_update": own("where MAC's kernels run a draft's layers, and those alone"),
    "supports_update_block_table": lacking("a step is planned for one block table, while building"),
    "update_block_table": platform("never called"),
    "update_draft_decode_metadata": own("a draft's rows move on"),
}


def pinning(decisions: dict[str, Decision]):
    """Decorates a class that goes before a platform's own: it answers as the table has it."""

    def pinned(cls: type) -> type:
        for name, decision in decisions.items():
            if decision.pinned is not _NOTHING:
                setattr(cls, name, decision.pinned)
        return cls

    return pinned


def refusing(asked: dict[str, Any]) -> list[Decision]:
    """The decisions against what a user chose. asked: arguments of `validate_configuration` by name."""
    return [one for one in BACKEND.values() if one.asked is not None and asked.get(one.asked)]


def refusals(asked: dict[str, Any]) -> list[str]:
    """Why MAC cannot serve what a user chose, `asked` as for `refusing`."""
    return [f"{one.asked}: {one.because}" for one in refusing(asked)]


def kv_cache_dtypes(platform: str | None, rule: str) -> tuple[str, ...]:
    """What --kv-cache-dtype may be. platform: a key of `BLOCK_SIZES`."""
    return KV_CACHE_DTYPES + (FP8_DTYPES if (platform, rule) == ("cuda", "index") else ())


def refused_kv_cache_dtype(
    kv_cache_dtype: str, platform: str | None, rule: str, own: str = "bfloat16"
) -> tuple[str, str] | None:
    """Why a KV cache of such a dtype is refused, and what to do; or None. own: the model's dtype."""
    choices = kv_cache_dtypes(platform, rule)
    if kv_cache_dtype in choices:
        return None
    where = "" if rule == "index" and platform == "cuda" else " without rule: index" if platform == "cuda" else " here"
    reason = f"--kv-cache-dtype is {kv_cache_dtype}, and MAC takes one of {', '.join(choices)}{where}"
    unquantised = f"give --kv-cache-dtype {own if own in choices else 'bfloat16'}"
    if rule == "index" and "fp8" in choices and kv_cache_dtype.startswith("fp8"):
        return reason, "give --kv-cache-dtype fp8_e4m3"
    if platform == "cuda" and kv_cache_dtype in FP8_DTYPES:
        return reason, f"{unquantised}, or set rule: index"
    return reason, unquantised


def refused_float8_gpu(capability: tuple[int, int]) -> str | None:
    """Why a GPU's kernels cannot read an FP8 KV cache, or None."""
    if capability >= FLOAT8_FROM:
        return None
    return f"this GPU is {_sm(capability)}, and MAC reads an FP8 KV cache on {_sm(FLOAT8_FROM)} or later"


def refused_block_size(block_size: int, platform: str, rule: str) -> str | None:
    """Why KV blocks of so many tokens, chosen by the user, are refused, or None. platform: a key of `BLOCK_SIZES`."""
    if rule == "index":
        sizes = INDEX_BLOCK_SIZES[platform]
        choices = f"and rule: index takes one of {', '.join(map(str, sizes))}"
        return None if block_size in sizes else f"--block-size is {block_size}, {choices}"
    unit = BLOCK_SIZES[platform]
    return f"--block-size is {block_size}, and MAC takes multiples of {unit}" if block_size % unit else None


def index_page(block_size: int, platform: str) -> int:
    """Tokens of a page with an index, where KV blocks have so many: of hybrid models a block is several pages. platform: as
    above."""
    sizes = [size for size in INDEX_BLOCK_SIZES[platform] if block_size % size == 0]
    if not sizes:
        choices = ", ".join(map(str, INDEX_BLOCK_SIZES[platform]))
        raise ValueError(f"KV blocks of {block_size} tokens, and rule: index takes multiples of {choices}")
    return sizes[-1]


def _sm(capability: tuple[int, int]) -> str:
    return f"sm{capability[0]}{capability[1]}"


def refused_gpu(capability: tuple[int, int]) -> str | None:
    if capability >= GPUS_FROM:
        return None
    return f"this GPU is {_sm(capability)}, and MAC needs {_sm(GPUS_FROM)} or later"


def refused_index_gpu(capability: tuple[int, int]) -> str | None:
    """Why a GPU cannot decode by the index of keys, or None. Goes when Triton compiles small integer products for sm100."""
    if capability < INDEX_BEFORE:
        return None
    return f"this GPU is {_sm(capability)}, and the kernels of rule: index are for GPUs before {_sm(INDEX_BEFORE)}"


def refused_ring_dtype(ring_dtype: str, capability: tuple[int, int], choices: Iterable[str]) -> str | None:
    """Why a GPU's kernels cannot convert to and from a ring's dtype, or None. choices: what `ring_dtype` may be."""
    if ring_dtype != "float8_e4m3fn" or capability >= FLOAT8_FROM:
        return None
    others = ", ".join(choice for choice in choices if choice != ring_dtype)
    return (
        f"ring_dtype: received {ring_dtype!r}, which needs a GPU of {_sm(FLOAT8_FROM)} or later, "
        f"and this one is {_sm(capability)}; must be one of {others}"
    )


def refused_index_size(index_size: int | None, head_size: int) -> str | None:
    """Why keys of so many numbers are not indexed in so many directions, or None."""
    if index_size is None or index_size <= head_size:
        return None
    most = head_size // 16 * 16
    return (
        f"index_size: received {index_size}, more than the head size {head_size}; "
        f"must be null or a multiple of 16 from 32 to {most}"
    )


def refused_draft_backend(speculative_config) -> str | None:
    """Why a draft model's own choice of MAC is refused, or None. All layers of such a model are exact; where the
    model that it drafts for runs without MAC, MAC could not tell the draft from it."""
    chosen = None if speculative_config is None else speculative_config.attention_backend
    if chosen is None or chosen.name != NAME:
        return None
    return (
        f"speculative_config.attention_backend: received {NAME}, which serves no draft model; "
        "leave it out, or choose another backend"
    )
