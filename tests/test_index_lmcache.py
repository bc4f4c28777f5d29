"""With `rule: index` and LMCache: a server in a process of its own keeps what one engine computes, and another loads it.

The connector is LMCache's own, as are all copies. An engine stores whole chunks of a prompt, here of one block.
"""

import socket
import sys
import time
from importlib.util import find_spec

import pytest

from support import engine as harness
from support.engine import Add, Limits
from support.index_engine import CONFIG, check_pages, counts, forget, layers, set_tolerance
from support.index_shadow import index_shadow
from support.scenarios import text
from support.servers import environment, free_port, running
from vllm_mac import kv_group

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning"),
    pytest.mark.skipif(find_spec("lmcache") is None, reason="needs LMCache: pip install lmcache"),
]
NEW, HEADS, LAYERS = 24, 8, 2
EXACT = {"mac": CONFIG | {"tolerance": 0.0}}
OPTIONS = {"prefix_caching": True, "chunk": 1024}
# LMCache answers when it does, and an engine without other work steps meanwhile.
LONG = {"max_steps": 1_000_000}
SHARED = text("shared", 200)
# One that ends inside a block, one whose last token alone is computed, and one of whole blocks, whose last is computed.
PROMPTS = {
    "a": SHARED + text("a", 150), "b": SHARED + text("b", 61), "c": text("c", 333), "d": text("d", 321),
    "e": text("e", 320),
}  # fmt: skip
STORED = {"a": 320, "b": 256, "c": 320, "d": 320, "e": 319}
EVENTS = [Add(3 * i, name, prompt, NEW) for i, (name, prompt) in enumerate(PROMPTS.items())]


@pytest.fixture(scope="module")
def transfer(tmp_path_factory):
    """vLLM's `kv_transfer_config` for a server with 256 MB, of which nothing is left in the end."""
    port = free_port()
    command = [
        sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(port),
        "--chunk-size", "32", "--l1-size-gb", "0.25", "--no-l1-use-lazy", "--eviction-policy", "LRU",
        "--supported-transfer-mode", "engine_driven", "--disable-observability",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("lmcache") / "log"
    with pytest.MonkeyPatch.context() as patch:
        # LMCache, here and there, says where it is used unless it is told not to.
        for name in ("LMCACHE_DISABLE_BANNER", "DO_NOT_TRACK"):
            patch.setenv(name, "1")
        patch.setenv("LMCACHE_TRACK_USAGE", "false")
        for name in ("LMCACHE_MP_TRANSFER_MODE", "LMCACHE_USE_UPSTREAM_MP"):
            patch.delenv(name, raising=False)
        with running(log, command, environment()) as process:
            until = time.monotonic() + 120
            while not listening(port):
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.2)
            extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port, "lmcache.mp.mq_timeout": 60.0}
            yield {
                "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra
            }  # fmt: skip


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def exact(model):
    """What vLLM's own backend says, without a connector."""
    with harness.engine(model, **OPTIONS) as llm:
        return harness.run_schedule(llm, EVENTS).tokens


def teach(llm, name: str) -> None:
    """Have an engine learn maps of a text that the server does not have, and count anew."""
    harness.run_schedule(llm, [Add(0, "teacher", text(name, 700), 2)], **LONG)
    assert all(layer.index.maps.ready for layer in layers(llm))
    settle(llm)
    forget(llm)


def settle(llm) -> None:
    """Step until LMCache has let go of the last blocks that it stores."""
    until = time.monotonic() + 60
    while not llm.reset_prefix_cache():
        assert time.monotonic() < until
        llm.llm_engine.step()


@pytest.fixture(scope="module")
def stored(model, exact, transfer):
    """The same for a server that has what an engine computed of the prompts, which then went."""
    with harness.engine(model, "v1", "MAC", EXACT, **OPTIONS, kv_transfer_config=transfer) as llm:
        connector = type(llm.llm_engine.engine_core.engine_core.scheduler.connector)
        assert connector.__module__ == "lmcache.integration.vllm.lmcache_mp_connector"
        run = harness.run_schedule(llm, EVENTS, **LONG)
        assert (
            run.tokens == exact and not run.cached["c"]
        )  # "a" and "b" share a prefix, and LMCache says which comes first
        settle(llm)
    return transfer


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_what_lmcache_hands_over_is_indexed(model, exact, stored, runner):
    with harness.engine(model, runner, "MAC", EXACT, **OPTIONS, kv_transfer_config=stored) as llm:
        teach(llm, f"teacher of {runner}")
        run = harness.run_schedule(llm, EVENTS, **LONG)
        assert run.cached == STORED and run.tokens == exact and check_pages(llm) > 30
        found = counts(llm)
        assert found["SKIPPED"] == 0 == found["NO_MAPS"]
        # The two whose first step decodes one token are read whole there, and looked up in all others.
        assert found["REQUEST"] == 2 * LAYERS * HEADS
        assert found["HIT"] == len(PROMPTS) * (NEW - 1) * LAYERS * HEADS
        settle(llm)

        set_tolerance(llm, 1.0)
        forget(llm)
        with index_shadow(llm) as watch:
            run = harness.run_schedule(llm, EVENTS, Limits(blocks=40), **LONG)
        assert run.cached["a"] == STORED["a"] and check_pages(llm) > 10
        assert watch.worst < 1e-4 and watch.looked > 100 and watch.pages > 500 and watch.first >= 2 * LAYERS
        assert counts(llm)["SKIPPED"] > 0
        settle(llm)


def test_without_indexing_anew_the_index_is_that_of_other_keys(model, stored, monkeypatch):
    """What the other test of this file would miss if it could."""
    with harness.engine(model, "v1", "MAC", EXACT, **OPTIONS, kv_transfer_config=stored) as llm:
        teach(llm, "teacher of none")
        monkeypatch.setattr(kv_group.Group, "index_begun", lambda *_: None)
        run = harness.run_schedule(llm, EVENTS, **LONG)
        assert run.cached["d"] == STORED["d"]
        with pytest.raises(AssertionError, match="codes of page"):
            check_pages(llm)
        settle(llm)
