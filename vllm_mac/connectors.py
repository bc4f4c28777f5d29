"""Which of vLLM's KV connectors an engine with MAC takes.

Pages have room for an index behind their keys and values. A connector must copy by the pages' own strides, and whatever
it loads is indexed anew (`kv_group.Group.index_begun`).
"""

import os

# Whole pages go from engine to engine, once NIXL's are shown where those end (`nixl`): two names of one.
NIXL = ("NixlConnector", "NixlPullConnector")
# Of others nobody has shown that they copy pages as they lie.
CONNECTORS = (
    "DecodeBenchConnector", "ExampleConnector", "LMCacheMPConnector", "MultiConnector", *NIXL, "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)  # fmt: skip
# LMCache's way to copy pages by which their room stays as it is: its own choice. On GPUs its other way takes pages to
# lie side by side and writes over the room; on CPUs the other one ends the engine.
LMCACHE_MODES = {"cpu": "engine_driven", "cuda": "lmcache_driven"}
LMCACHE_MODE, LMCACHE_MODE_KEY = "LMCACHE_MP_TRANSFER_MODE", "lmcache.mp.mp_transfer_mode"
NONE = "leave out --kv-transfer-config and --kv-offloading-size"


def refused(transfer, rule: str, platform: str | None, two_sizes: bool = False) -> tuple[str, str] | None:
    """Why KV blocks that a connector fills are refused, and what to do; or None.

    transfer: vLLM's `KVTransferConfig`, or None. two_sizes: whether layers of one group may have pages of other sizes.
    """
    if transfer is None or not transfer.is_kv_transfer_instance:
        return None
    chosen = [(transfer.kv_connector, transfer.kv_connector_module_path, transfer.kv_connector_extra_config)]
    if transfer.kv_connector == "MultiConnector":
        several = transfer.kv_connector_extra_config.get("connectors", [])
        keys = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
        chosen += [tuple(map(one.get, keys)) for one in several]
    others = [
        f"{name} of {module}" if module else name for name, module, _ in chosen if module or name not in CONNECTORS
    ]
    if rule == "match":
        reason = (
            f"kv_connector is {transfer.kv_connector}, and with rule: match no ring has seen what a connector loads"
        )
        return reason, NONE + ("" if others else ", or set rule: index")
    if others:
        return (
            f"kv_connector is {others[0]}, and rule: index takes one of {', '.join(CONNECTORS)}, which copy KV pages "
            "that have room for an index",
            f"choose one of these, or {NONE}",
        )
    lmcache = [extra or {} for name, _, extra in chosen if name == "LMCacheMPConnector"]
    if lmcache and two_sizes and platform == "cuda":
        return (
            "vLLM's hybrid KV cache manager is off, so layers with a window or chunks have smaller pages than others, "
            "and LMCacheMPConnector copies all by the size of the first layer's",
            "leave out --disable-hybrid-kv-cache-manager and whatever else turns it off, or --kv-transfer-config",
        )
    return next(filter(None, (_refused_lmcache(extra, platform) for extra in lmcache)), None)


def _refused_lmcache(extra: dict, platform: str | None) -> tuple[str, str] | None:
    """The same for how LMCache is set up. extra: the connector's `kv_connector_extra_config`."""
    if own := os.environ.get("LMCACHE_USE_UPSTREAM_MP"):
        return (
            f"LMCACHE_USE_UPSTREAM_MP is {own}, by which LMCacheMPConnector is vLLM's copy, and rule: index takes "
            "LMCache's own",
            "unset LMCACHE_USE_UPSTREAM_MP",
        )
    # As LMCache reads them: the key comes first.
    name, mode = LMCACHE_MODE_KEY, extra.get(LMCACHE_MODE_KEY)
    if LMCACHE_MODE_KEY not in extra:
        name, mode = LMCACHE_MODE, os.environ.get(LMCACHE_MODE)
    right = LMCACHE_MODES.get(platform)
    if right is None or str(mode or "auto").lower() in ("auto", right):
        return None
    return (
        f"{name} is {mode}, and rule: index takes {right} here, which copies KV pages that have room for an index",
        f"unset {name}" if name == LMCACHE_MODE else f"leave {name} out of kv_connector_extra_config",
    )
