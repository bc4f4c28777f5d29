"""A KV connector of the tests: it keeps prompts' keys and values in this process, and hands them over as real ones do.

    kv_transfer_config=Connector.config("layers", 200)

sync: pages are loaded before the step that first needs them. layers: each layer's, when its attention asks for them,
after the step's own keys were written. async: two steps after a request asked for them, which waits meanwhile. fails: as
sync, but for the first request that asks the pages from the third on hold other numbers, and are reported. late: the
same as async.
"""

from dataclasses import dataclass, field

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

STORE: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}  # by prompt and layer, `[tokens, K, 2 D]`
MODES = ("sync", "layers", "async", "fails", "late")


@dataclass
class Load:
    """Tokens `[begin, end)` of a stored prompt, to the pages of a request."""

    request: str
    prompt: tuple[int, ...]
    begin: int
    end: int
    blocks: list[int]
    bad: set[int] = field(default_factory=set)
    age: int = 0


@dataclass
class Meta(KVConnectorMetadata):
    loads: list[Load] = field(default_factory=list)
    saves: list[tuple[tuple[int, ...], list[int]]] = field(default_factory=list)


class Connector(KVConnectorBase_V1):
    """most: tokens that it hands over of a prompt, as many as there are where it is None."""

    failures = 0  # loads that failed, of all engines

    @classmethod
    def config(cls, mode: str, most: int | None = None) -> dict:
        if "TestConnector" not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector("TestConnector", __name__, "Connector")
        return {
            "kv_connector": "TestConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"mode": mode, "most": most},
        }  # fmt: skip

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self.mode, self.most = extra["mode"], extra["most"]
        if self.mode not in MODES:
            raise ValueError(f"mode: {self.mode!r}, choose from {MODES}")
        self.page = vllm_config.cache_config.block_size
        self.local: dict[str, int] = {}  # by request, tokens found in the engine's own cache
        self.loads: list[Load] = []
        self.under_way: list[Load] = []
        self.done: set[str] = set()
        self.invalid: set[int] = set()

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        prompt = tuple(request.prompt_token_ids)
        _, common = self._best(prompt)
        self.local[request.request_id] = num_computed_tokens
        found = max(min(common, self.most or common, len(prompt) - 1) - num_computed_tokens, 0)
        return found, found > 0 and self.mode in ("async", "late")

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if not num_external_tokens:
            return
        prompt, _ = self._best(tuple(request.prompt_token_ids))
        begin = self.local[request.request_id]
        ids = blocks.get_block_ids()[0]
        self.loads.append(Load(request.request_id, prompt, begin, begin + num_external_tokens, ids))

    def build_connector_meta(self, scheduler_output):
        loads, self.loads = self.loads, []
        tokens = scheduler_output.num_scheduled_tokens
        saves = [
            (tuple(x.prompt_token_ids), x.block_ids[0])
            for x in scheduler_output.scheduled_new_reqs
            if tokens[x.req_id] == len(x.prompt_token_ids)
        ]
        return Meta(loads=loads, saves=saves)

    @staticmethod
    def _best(prompt: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The stored prompt that has most in common with `prompt`, and how many tokens."""
        alike = lambda other: next(
            (i for i, (x, y) in enumerate(zip(prompt, other, strict=False)) if x != y), min(len(prompt), len(other))
        )
        return max(((other, alike(other)) for other in STORE), key=lambda pair: pair[1], default=((), 0))

    # The worker's side.

    def register_kv_caches(self, kv_caches):
        self.caches = kv_caches

    def start_load_kv(self, forward_context, **kwargs):
        loads = self._connector_metadata.loads
        if self.mode in ("fails", "late") and loads and not Connector.failures:
            Connector.failures += 1
            loads[0].bad = set(range(2, -(-loads[0].end // self.page)))
        if self.mode in ("async", "late"):
            self.under_way += loads
        elif self.mode != "layers":
            for load in loads:
                self._load(load, self.caches)

    def wait_for_layer_load(self, layer_name):
        if self.mode == "layers":
            for load in self._connector_metadata.loads:
                self._load(load, [layer_name])

    def _load(self, load: Load, layers) -> None:
        token = torch.arange(load.begin, load.end)
        page = torch.tensor(load.blocks)[token // self.page]
        for name in layers:
            rows = STORE[load.prompt][name][load.begin : load.end].clone()
            for bad in load.bad:
                rows[token // self.page == bad] = 1e3
            self.caches[name][page, :, token % self.page] = rows
        self.invalid |= {load.blocks[bad] for bad in load.bad}

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        for prompt, blocks in self._connector_metadata.saves:
            token = torch.arange(len(prompt))
            page = torch.tensor(blocks)[token // self.page]
            STORE.setdefault(prompt, {})[layer_name] = kv_layer[page, :, token % self.page].clone()

    def wait_for_save(self):
        pass

    def get_finished(self, finished_req_ids):
        for load in self.under_way:
            load.age += 1
            if load.age == 2:
                self._load(load, self.caches)
                self.done.add(load.request)
        self.under_way = [load for load in self.under_way if load.age < 2]
        done, self.done = self.done, set()
        return None, done

    def get_block_ids_with_load_errors(self):
        invalid, self.invalid = self.invalid, set()
        return invalid
