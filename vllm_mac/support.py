"""What MAC's backends answer when vLLM asks what they support; the same on every platform."""

from typing import ClassVar

from vllm.v1.attention.backend import AttentionType

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")


class MacSupport:
    """Goes before a platform's own backend class, whose other answers stand."""

    supported_kv_cache_dtypes: ClassVar[list] = list(KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return "MAC"

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype) -> bool:
        return kv_cache_dtype in (None, *KV_CACHE_DTYPES)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # Ring ownership follows writes into KV blocks, and a connector's are not seen.
        return False

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix, device_capability
    ) -> str | None:  # fmt: skip
        if not cls.supports_kv_cache_dtype(kv_cache_dtype):
            return f"--kv-cache-dtype is {kv_cache_dtype}, and MAC takes one of {', '.join(KV_CACHE_DTYPES)}"
        return super().supports_combination(
            head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix, device_capability
        )
