"""Which of vLLM's KV connectors an engine with MAC takes.

Pages have room for an index behind their keys and values. A connector must copy by the pages' own strides, and whatever
it loads is indexed anew (`kv_group.Group.index_begun`).
"""

import os

# Whole pages go from engine to engine, once NIXL's are shown where those end (`nixl`): two names of one.
NIXL = ("NixlConnector", "NixlPullConnector")
LMCACHE = "LMCacheMPConnector"
# Of others nobody has shown that they copy pages as they lie.
CONNECTORS = (
    "DecodeBenchConnector", "ExampleConnector", LMCACHE, "MultiConnector", *NIXL, "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)  # fmt: skip
# LMCache's kernels for GPUs were never run on such pages.
ON_CPUS = (LMCACHE,)
NONE = "leave out --kv-transfer-config and --kv-offloading-size"


def refused(transfer, rule: str, platform: str | None) -> tuple[str, str] | None:
    """Why KV blocks that a connector fills are refused, and what to do; or None. transfer: vLLM's `KVTransferConfig`, or None."""
    if transfer is None or not transfer.is_kv_transfer_instance:
        return None
    chosen, permutes = [(transfer.kv_connector, transfer.kv_connector_module_path)], [transfer.enable_permute_local_kv]
    if transfer.kv_connector == "MultiConnector":
        several = transfer.kv_connector_extra_config.get("connectors", [])
        chosen += [(one.get("kv_connector"), one.get("kv_connector_module_path")) for one in several]
        permutes += [one.get("enable_permute_local_kv") for one in several]
    taken = [name for name in CONNECTORS if platform != "cuda" or name not in ON_CPUS]
    others = [f"{name} of {module}" if module else name for name, module in chosen if module or name not in taken]
    if rule == "match":
        reason = (
            f"kv_connector is {transfer.kv_connector}, and with rule: match no ring has seen what a connector loads"
        )
        return reason, NONE + ("" if others else ", or set rule: index")
    if others:
        return (
            f"kv_connector is {others[0]}, and rule: index takes one of {', '.join(taken)}, which copy KV pages that "
            "have room for an index",
            f"choose one of these, or {NONE}",
        )
    if any(permutes):
        return (
            "enable_permute_local_kv is true, which permutes keys and values by a shape that pages with an index have not",
            "leave it out of --kv-transfer-config",
        )
    if LMCACHE in [name for name, _ in chosen] and (own := os.environ.get("LMCACHE_USE_UPSTREAM_MP")):
        return (
            f"LMCACHE_USE_UPSTREAM_MP is {own}, by which {LMCACHE} is vLLM's copy, and rule: index takes LMCache's own",
            "unset LMCACHE_USE_UPSTREAM_MP",
        )
    return None
