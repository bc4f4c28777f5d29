"""What the tests of the configuration share."""

import pytest

from vllm_mac.config import MIN_CONTEXTS, MacConfig, MacConfigError, only_of, resolve

DEFAULTS = {
    "enabled": True,
    "rule": "index",
    "tolerance": 0.7,
    "index_size": None,
    "min_step_mib": 48,
    "maps": None,
    "window": 512,
    "band": 256,
    "sink": 0,
    "threshold": 0.85,
    "distance": "absolute",
    "min_context": "auto",
    "lag_weight": 0.0,
    "reuse": "anchored",
    "max_chain": None,
    "mass_floor": 0.2,
    "ring_dtype": "auto",
    "max_sequences": None,
    "ring_memory_gib": None,
    "miss_engine": "triton",
    "audit": 0.0,
    "error_budget": None,
    "layers": {"include": None, "exclude": [], "threshold": {}},
}


def chosen(*at: str) -> dict[str, str]:
    """The key `rule` with a rule that reads the key at this place; none for `rule` itself."""
    return {} if at == ("rule",) else {"rule": only_of(at) or "match"}


def keys_of(config: MacConfig) -> dict:
    """Its keys, `auto` for a `min_context` that the rule has by default."""
    keys = config.model_dump(mode="json")
    return keys | ({"min_context": "auto"} if keys["min_context"] == MIN_CONTEXTS[config.rule] else {})


def refusal(inline: object, environ: dict[str, str] | None = None) -> str:
    """The message with which `resolve` refuses."""
    with pytest.raises(MacConfigError) as caught:
        resolve(inline, environ or {})
    return str(caught.value)
