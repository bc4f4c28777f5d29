"""Reports what is wrong with a configuration before any engine starts, in the process that the user started.

vLLM makes its configuration there (`EngineArgs.create_engine_config`: servers, `LLM`, headless nodes), loads plugins
before it does, and passes the result to its engines. An engine's exception is buried under the tracebacks of the
processes above it; an exception raised here is the last line printed. The engines check again, by the same rules
(`config`, `capabilities`, `connectors`, `maps_file`): what only a layer knows, they alone see.
"""

import difflib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping

from vllm.config import AttentionConfig, VllmConfig
from vllm.logger import init_logger

from vllm_mac import capabilities, compilers, connectors, maps_file
from vllm_mac.config import FILE_KEY, RING_DTYPES, MacConfig, MacConfigError, resolve
from vllm_mac.plugin import NAME

logger = init_logger("vllm.mac")

BLOCK = "mac"  # the key of --additional-config
VARIABLE = "VLLM_ATTENTION_BACKEND"  # no vLLM that is supported reads it; older ones chose their backend by it
KEYS = (*MacConfig.model_fields, FILE_KEY)
# KV-cache kinds by which vLLM looks a layer's backend up in `backend_per_kind`.
PLAIN, MLA = ("full_attention", "sliding_window"), ("mla_attention", "sliding_window_mla")
ENCODERS = {"encoder_only": ("encoder_only_attention",), "encoder_decoder": ("cross_attention",)}


def install() -> None:
    """Have vLLM check MAC's part of every configuration that it makes. Goes when vLLM asks its plugins itself."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, "checks_mac", False):
        return

    @functools.wraps(original)
    def create_engine_config(self, *args, **kwargs):
        vllm_config = original(self, *args, **kwargs)
        try:
            check(vllm_config, self.kv_cache_dtype)
        except MacConfigError:
            raise
        except Exception:  # must not stop what would start without it
            logger.warning("vllm-mac could not check its configuration before the engine starts", exc_info=True)
        return vllm_config

    create_engine_config.checks_mac = True
    EngineArgs.create_engine_config = create_engine_config


def check(vllm_config: VllmConfig, kv_cache_dtype: str = "auto") -> None:
    """Raise MacConfigError for what MAC cannot serve; warn of what the user wrote and nothing reads.

    kv_cache_dtype: what the user asked for; `vllm_config` has what vLLM and the checkpoint made of it.
    """
    parallel = vllm_config.parallel_config
    if parallel._api_process_count > 1 and parallel._api_process_rank >= 0:
        return  # one of several API servers, whose parent has checked
    extra = vllm_config.additional_config
    keys = extra if isinstance(extra, Mapping) else {}
    option = chosen_by(vllm_config.attention_config)
    if option is None:
        _warn_of_unread(keys)
        return
    _check_neighbours(keys)
    config = resolve(keys.get(BLOCK))
    found = [*refusals(vllm_config, config, kv_cache_dtype)]
    if found:
        reasons = "; ".join(f"{because}: {cure or f'leave {option} out'}" for because, cure in found)
        raise MacConfigError(f"{option} cannot serve this model as configured: {reasons}")
    _warn_of_caches()


def chosen_by(attention_config: AttentionConfig) -> str | None:
    """The option by which MAC is the backend of some layers, or None."""
    if _is_mac(attention_config.backend):
        return f"--attention-backend {NAME}"
    if any(map(_is_mac, attention_config.backend_per_kind.values())):
        return f"--attention-config.backend_per_kind {NAME}"
    return None


def refusals(
    vllm_config: VllmConfig, config: MacConfig, kv_cache_dtype: str = "auto"
) -> Iterator[tuple[str, str | None]]:
    """Yields (reason, what to do or None) for whatever the configuration alone shows that MAC cannot serve."""
    from vllm.platforms import current_platform

    if reason := capabilities.refused_draft_backend(vllm_config.speculative_config):
        yield reason, "leave attention_backend out of --speculative-config"
    model, attention = vllm_config.model_config, vllm_config.attention_config
    kinds = ENCODERS.get(model.attn_type, MLA if model.use_mla else PLAIN)
    backends = (attention.backend_per_kind.get(kind, attention.backend) for kind in kinds)
    if model.is_attention_free or not any(map(_is_mac, backends)):
        return
    platform = "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda() else None
    rule = config.rule if config.enabled else "match"
    cache = vllm_config.cache_config
    dtype, own = cache.cache_dtype, str(model.dtype).removeprefix("torch.")
    if dtype == "auto" and _kv_cache_scheme(vllm_config) is not None:
        dtype = "fp8"  # what vLLM's layers make of it
    refused_dtype = capabilities.refused_kv_cache_dtype(dtype, platform, rule, own)
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is not None:
        if not compilers.has_flashinfer():
            yield "FlashInfer is not installed, which MAC needs on GPUs", compilers.FLASHINFER
        if reason := capabilities.refused_gpu(tuple(capability)):
            yield reason, None
        elif rule == "index" and (reason := capabilities.refused_index_gpu(tuple(capability))):
            yield reason, capabilities.TO_MATCH
        elif (
            dtype in capabilities.FP8_DTYPES
            and refused_dtype is None
            and (reason := capabilities.refused_float8_gpu(tuple(capability)))
        ):
            yield reason, f"give --kv-cache-dtype {own if own in capabilities.KV_CACHE_DTYPES else 'bfloat16'}"
        elif reason := capabilities.refused_ring_dtype(config.ring_dtype, tuple(capability), RING_DTYPES):
            yield reason, "choose another ring_dtype"
    if model.attn_type in ENCODERS:
        yield (
            f"the model's attention is {model.attn_type}, and MAC takes {', '.join(capabilities.ATTENTION_TYPES)}",
            None,
        )
    if kinds is MLA:
        yield "the model's attention is MLA, whose cache holds no keys and values to read in part", None
    for decision in capabilities.refusing(asked(vllm_config)):
        yield f"{decision.asked}: {decision.because}", decision.cure
    if config.enabled and (refused := connectors.refused(vllm_config.kv_transfer_config, config.rule, platform)):
        yield refused
    if rule == "index":
        for key, what in (("kv_transfer_config", "a KV connector"), ("speculative_config", "speculation")):
            if model.is_hybrid and getattr(vllm_config, key) is not None:
                yield f"the model is hybrid, and rule: index was not tried with {what} there", "start without it"
        quantised = dtype not in capabilities.KV_CACHE_DTYPES
        yield from _against_index(model, config, quantised and bool(cache.kv_cache_dtype_skip_layers))
        first = config.maps and maps_file.own_path(
            vllm_config, config.maps
        )  # the first worker's: no process is one yet
        if first and (reason := maps_file.fault(first, maps_file.model_of(vllm_config))):
            yield reason, "choose another file, or leave it out"
    # Which layers the list spares, they know.
    if refused_dtype is not None and not cache.kv_cache_dtype_skip_layers:
        reason, cure = refused_dtype
        yield reason + (", which is the checkpoint's choice" if kv_cache_dtype == "auto" else ""), cure
    if (
        cache.user_specified_block_size
        and platform
        and (reason := capabilities.refused_block_size(cache.block_size, platform, rule))
    ):
        match = rule == "index" and not capabilities.refused_block_size(cache.block_size, platform, "match")
        yield reason, "leave out --block-size" + (f", or {capabilities.TO_MATCH}" if match else "")


def _against_index(model, config: MacConfig, two_dtypes: bool) -> Iterator[tuple[str, str | None]]:
    """The same for `rule: index`, whose pages are larger than those that vLLM reckons with.

    model: vLLM's configuration of it. two_dtypes: whether some layers have a quantised KV cache and others do not.
    """
    import vllm.envs as envs

    if (layout := envs.VLLM_KV_CACHE_LAYOUT) not in (None, *capabilities.INDEX_LAYOUTS):
        choices = ", ".join(capabilities.INDEX_LAYOUTS)
        yield (
            f"VLLM_KV_CACHE_LAYOUT is {layout}, and rule: index takes one of {choices}",
            f"unset VLLM_KV_CACHE_LAYOUT, or {capabilities.TO_MATCH}",
        )
    if two_dtypes:
        yield (
            "--kv-cache-dtype-skip-layers gives KV pages of two sizes, and rule: index takes one",
            capabilities.TO_MATCH,
        )
    # Where heads differ by layer, each layer's own is checked once it is built.
    if reason := capabilities.refused_index_size(config.index_size, model.get_head_size()):
        yield reason, "choose another index_size"


def asked(vllm_config: VllmConfig) -> dict[str, bool]:
    """What vLLM will ask MAC's class about this configuration, as far as no layer is needed for it.

    Keys as the parameters of `validate_configuration`, values as `vllm.v1.attention.selector` finds them.
    """
    import vllm.envs as envs

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculation = vllm_config.speculative_config
    scheme = _kv_cache_scheme(vllm_config)
    return {
        "use_batch_invariant": envs.VLLM_BATCH_INVARIANT,
        "use_dcp": parallel.decode_context_parallel_size > 1,
        "use_pcp": parallel.prefill_context_parallel_size > 1,
        "use_adaptive_verification": speculation is not None and speculation.enable_adaptive_verification,
        "use_mm_prefix": model.is_mm_prefix_lm,
        "use_non_causal": vllm_config.attention_config.use_non_causal,
        "use_per_head_quant_scales": scheme is not None and scheme.get("strategy") == "attn_head",
        "use_rswa": model.rswa_window is not None,
    }


def _is_mac(backend) -> bool:
    return backend is not None and backend.name == NAME


def _kv_cache_scheme(vllm_config: VllmConfig) -> dict | None:
    """How the checkpoint wants its KV cache quantised, where its quantisation has such a thing."""
    return getattr(vllm_config.quant_config, "kv_cache_scheme", None)


def _check_neighbours(keys: Mapping) -> None:
    """Raise for keys beside `mac` that are certainly meant for MAC; warn of those that look so.

    Other plugins have keys of their own there.
    """
    for key in keys:
        if (key in MacConfig.model_fields and BLOCK not in keys) or (_is_block(key) and key != BLOCK):
            right = keys[key] if _is_block(key) else {key: keys[key]}
            raise MacConfigError(
                f"--additional-config: received {key!r} at the top, where MAC reads {BLOCK!r} alone; "
                f"write --additional-config '{json.dumps({BLOCK: right}, default=str)}'"
            )
        if key != BLOCK and _looks_like_ours(str(key)):
            logger.warning_once(
                "--additional-config: MAC does not read %s, which looks like its own; its keys go into %s, as in "
                """'{"mac": {"tolerance": 1.0}}'""", repr(key), repr(BLOCK),
            )  # fmt: skip


def _is_block(key) -> bool:
    return isinstance(key, str) and key.lower() == BLOCK


def _looks_like_ours(key: str) -> bool:
    return bool(re.match(r"mac([-_. ]|att)", key, re.IGNORECASE)) or bool(
        difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85)
    )


def _warn_of_caches() -> None:
    """Kernels that are not compiled yet cannot be; those of an image that brings them all can be read."""
    from vllm.platforms import current_platform

    for cache in compilers.unwritable() if current_platform.is_cuda() else ():
        logger.warning_once(
            "%s keeps the kernels that it compiles in %s, which cannot be written: those that are not there cannot be "
            "compiled. Set %s to a folder that can", cache.whose, cache.folder, cache.variable,
        )  # fmt: skip


def _warn_of_unread(keys: Mapping) -> None:
    if os.environ.get(VARIABLE, "").upper() == NAME:
        logger.warning_once(
            "%s=%s chooses nothing: vLLM does not read this variable. Give --attention-backend %s", VARIABLE, NAME, NAME
        )
    for key in keys:
        if _is_block(key):
            logger.warning_once(
                "--additional-config has %s, but no layer's backend is MAC. Give --attention-backend %s",
                repr(key),
                NAME,
            )
