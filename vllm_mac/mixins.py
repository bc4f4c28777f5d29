"""The two mixins that make a platform's own backend and layer implementation MAC's."""

import inspect
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionType

from vllm_mac import capabilities, connectors
from vllm_mac.capabilities import ATTENTION_TYPES, BACKEND, IMPL, KV_CACHE_DTYPES, pinning, refusals
from vllm_mac.index_pages import indexing, note, with_index
from vllm_mac.layers import MacLayer, configuration, mac_layers
from vllm_mac.nixl import adapt
from vllm_mac.requests import follow


@pinning(BACKEND)
class MacSupport:
    """Precedes a platform's own backend class, whose other answers stand."""

    supported_kv_cache_dtypes: ClassVar[list] = list(KV_CACHE_DTYPES)
    _platform: ClassVar[str] = "cpu"  # a key of `capabilities.BLOCK_SIZES`

    @staticmethod
    def get_name() -> str:
        return "MAC"

    @classmethod
    def customize_spec(cls, spec):
        return with_index(super().customize_spec(spec), capabilities.BLOCK_SIZES[cls._platform])

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype) -> bool:
        return cls._refused_kv_cache_dtype(kv_cache_dtype) is None

    @classmethod
    def _refused_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> tuple[str, str] | None:
        rule = "index" if indexing() else "match"
        return capabilities.refused_kv_cache_dtype(kv_cache_dtype or "auto", cls._platform, rule)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in ATTENTION_TYPES

    @classmethod
    def supports_kv_connector(cls) -> bool:
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None:
            return False
        config = configuration(vllm_config)
        transfer = vllm_config.kv_transfer_config
        return not config.enabled or connectors.refused(transfer, config.rule, cls._platform) is None

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix, device_capability
    ) -> str | None:  # fmt: skip
        if refused := cls._refused_kv_cache_dtype(kv_cache_dtype):
            return refused[0]
        return super().supports_combination(
            head_size,
            dtype,
            kv_cache_dtype,
            block_size,
            use_mla,
            has_sink,
            use_sparse,
            use_mm_prefix,
            device_capability,
        )

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        validate = super().validate_configuration
        reasons = validate(*args, **kwargs)
        return reasons + refusals(inspect.signature(validate).bind(*args, **kwargs).arguments)


@pinning(IMPL)
class MacImpl:
    """Precedes a platform's own implementation of a layer, and adds `MacLayer` as `mac`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        arguments: list = [
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
            logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks,
        ]  # fmt: skip
        super().__init__(*arguments)  # the platform's own class comes next, and may set this of each object
        self.supports_quant_query_input = False
        vllm_config = get_current_vllm_config()
        follow(vllm_config)
        adapt(vllm_config)
        self.mac = MacLayer(
            vllm_config,
            num_heads,
            num_kv_heads,
            head_size,
            scale,
            sliding_window,
            {
                "soft_cap": bool(logits_soft_cap),
                "alibi": alibi_slopes is not None,
                "attention_sinks": sinks is not None,
                "kv_sharing": kv_sharing_target_layer_name is not None,
            },
        )

        layers = (*mac_layers(vllm_config), self.mac)
        # That of the first layer: a draft model has a configuration of its own, and comes last.
        note(layers[0].vllm_config, self.mac.settings, any(layer.exact is None for layer in layers))

    def _unprepared(self) -> RuntimeError:
        """What `forward` raises for a layer that MAC runs, in a batch whose metadata has no step for it: otherwise
        nothing would write its output."""
        return RuntimeError(
            f"MAC serves {self.mac.name}, but the metadata of this batch is for layers that it does not serve"
        )
