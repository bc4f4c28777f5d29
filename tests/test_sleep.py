"""Sleep level 2, which discards what was allocated while the model was loaded, but for the buffers of modules.

vLLM's workers for CPUs do not sleep. So the code of its worker for GPUs runs here, and what discards memory is a
stand-in: it leaves in every tensor that it finds what new pages may hold. On a GPU an engine really sleeps.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from support import engine as harness
from support.audited import Stepper
from support.hit_batches import Case
from support.scenarios import text
from support.stub_flashinfer import gpu_backend
from support.tiny_models import write
from vllm_mac import metrics
from vllm_mac.layers import mac_layers


def tensors(thing, seen: dict | None = None) -> list[torch.Tensor]:
    """Every tensor that an object of the project's holds, itself or through others of them."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return []
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    inside = []
    if isinstance(thing, (list, tuple)):
        inside = thing
    elif isinstance(thing, dict):
        inside = thing.values()
    elif type(thing).__module__.startswith("vllm_mac."):
        inside = [
            getattr(thing, name) for name in {*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())}
        ]
    return [tensor for one in inside for tensor in tensors(one, seen)]


class Discarding:
    """A sleep-mode backend whose pages come back with whatever was in them."""

    def __init__(self, owners):
        self.owners = owners

    def suspend(self, level):
        assert level == 2
        for tensor in {id(x): x for x in tensors(self.owners)}.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 3)

    def resume(self, tags):
        pass


def worker(monkeypatch, model: torch.nn.Module, owners):
    """vLLM's worker for GPUs around `model`; what `owners` hold is discarded in its sleep."""
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (1 << 30, 1 << 31))
    made = object.__new__(Worker)
    made.model_runner = SimpleNamespace(model=model)
    made.model_config = SimpleNamespace(sleep_preserve_parameter_names=())
    made.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_nccl_comm_suspend=False))
    made._sleep_mode_backend = Discarding(owners)
    made._sleep_saved_buffers, made._sleep_saved_draft_buffers = {}, {}
    made._sleep_saved_parameters = {}
    made.get_draft_model = lambda: None
    made.synchronize_device = lambda: None
    return made


@pytest.mark.cpu
def test_a_decoder_is_as_before(monkeypatch):
    """The counters of arrival decide which program completes a group; edges sort audited errors into buckets."""
    stepper = Stepper(Case((200, 190, 180), "mixed", rotary=0), 1e-4)
    stepper.check()
    layer = torch.nn.Module()
    for name, tensor in stepper.decoder.lasting().items():
        layer.register_buffer(name, tensor)
    addresses = {name: tensor.data_ptr() for name, tensor in layer.named_buffers()}
    asleep = worker(monkeypatch, layer, stepper.decoder)
    batch = stepper.batch
    asleep.sleep(2)
    assert bool((stepper.decoder._work.arrived == 3).all())  # it was discarded
    asleep.wake_up()
    assert addresses == {name: tensor.data_ptr() for name, tensor in layer.named_buffers()}  # where graphs find it
    for name in ("position", "ring", "first"):  # which are assigned in every step
        getattr(stepper.decoder, name).fill_(-1)
        getattr(stepper.decoder, name)[: len(batch.position)].copy_(getattr(batch, name))
    stepper.check()


@pytest.mark.cpu
def test_a_gpu_s_decoder_is_kept_with_its_first_layer(monkeypatch):
    """Of what is made at load: the decoder's lasting parts and the layer's counters are buffers of the model."""
    layers, cuda = [], gpu_backend()
    monkeypatch.setattr(cuda, "mac_layers", lambda _: [layer.impl.mac for layer in layers])
    monkeypatch.setattr(cuda.FlashInferImpl, "process_weights_after_loading", lambda *_: None)
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}, max_cudagraph_capture_size=4),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(), max_model_len=256, dtype=torch.float32, supports_multimodal_inputs=False
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        cache_config=SimpleNamespace(block_size=16), device_config=SimpleNamespace(device="cpu"), speculative_config=None,
        additional_config={"mac": {"rule": "match", "window": 8, "band": 4, "min_context": 16, "audit": 0.5}},
    )  # fmt: skip
    model = torch.nn.ModuleList()
    for i in range(2):
        attention = torch.nn.Module()
        attention.get_kv_cache_spec, attention.kv_cache_dtype = lambda _: object.__new__(FullAttentionSpec), "auto"
        attention.impl = object.__new__(cuda.MacCUDAImpl)
        attention.impl.mac = cuda.MacLayer(vllm_config, 4, 2, 64, 0.125)
        attention.layer_name = f"model.layers.{i}.attn"
        attention.impl.mac.bind(torch.nn.Module(), attention.layer_name)
        vllm_config.compilation_config.static_forward_context[attention.layer_name] = attention
        model.append(attention)
        layers.append(attention)
    for layer in layers:
        layer.impl.process_weights_after_loading(torch.float32)
    first, second = (layer.impl.mac for layer in layers)
    decoder = first.decoder
    assert decoder is not None and second.decoder is None
    buffers = {id(buffer) for buffer in model.buffers()}
    kept = [decoder._work.arrived, decoder._misses._arrived, decoder._auditor._exact._arrived, decoder._auditor._edges]
    kept += [decoder.slack, decoder.spared]
    assert buffers == {id(x) for x in (*kept, first.counts, first.audited, second.counts, second.audited)}
    asleep = worker(monkeypatch, model, [first, second])
    first.counts[:] = torch.arange(len(first.counts))
    decoder.slack[0], decoder.spared[1] = 0.25, 0  # written only when they change
    edges = decoder._auditor._edges.clone()
    asleep.sleep(2), asleep.wake_up()
    assert first.counts.tolist() == list(range(len(first.counts))) and not second.audited.any()
    assert not any(counter.any() for counter in kept[:3]) and torch.equal(kept[3], edges)
    assert decoder.slack.tolist()[:2] == [0.25, 1.0] and decoder.spared.tolist()[:2] == [-1, 0]
    assert bool(first.state.store.query.isnan().all())  # rings are not kept


@pytest.mark.cpu
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_an_engine_that_slept_decodes_and_counts_as_one_that_did_not(tmp_path, monkeypatch, runner):
    """A request that runs meanwhile is computed anew, as after preemption: nothing of an earlier ring may be read."""
    config = {"mac": {"window": 32, "band": 16, "min_context": 64, "threshold": 0.0, "audit": 1.0, "error_budget": 1.0}}
    events = [harness.Add(0, "a", text("a", 120), 16), harness.Add(0, "b", text("b", 90), 12)]
    with harness.engine(write("llama", tmp_path), runner, "MAC", config) as llm:
        own = harness.worker(llm)
        layers = mac_layers(own.vllm_config)

        def counted():
            return [tensor.clone() for layer in layers for tensor in (layer.counts, layer.audited)]

        before = counted()
        run = harness.run_schedule(llm, [*events, harness.Preempt(8)], logprobs=2)
        once = [now - then for now, then in zip(counted(), before, strict=True)]
        assert set(run.preempted) == {"a", "b"} and all(bool(x.any()) for x in once)

        caches = [x.kv_cache for x in own.vllm_config.compilation_config.static_forward_context.values()]
        # The table that says what rings hold is made in the first step, outside the pools that sleep.
        loaded = [layer.state for layer in layers]
        asleep = worker(monkeypatch, own.model_runner.model, [loaded, caches])
        monkeypatch.setattr(own, "sleep", asleep.sleep)
        monkeypatch.setattr(own, "wake_up", asleep.wake_up)
        before = counted()
        slept = harness.run_schedule(llm, [*events, harness.Sleep(8, 2)], logprobs=2)
        assert bool(torch.isnan(layers[0].state.store.query).any())  # rings were discarded, and not all written since
        again = [now - then for now, then in zip(counted(), before, strict=True)]
        assert slept.tokens == run.tokens and slept.logprobs == run.logprobs
        assert all(torch.equal(x, y) for x, y in zip(again, once, strict=True))
        assert metrics.summarise(llm.collective_rpc(metrics.counters)[0]).hit_rate > 0.5


@pytest.mark.gpu
def test_an_engine_sleeps_on_a_gpu(byte_model):
    """Rings come back as whatever the new pages held, and counters of arrival as they were.

    With graphs, whose replays read the addresses of before; vLLM allows one engine that sleeps a process.
    """
    config = {"mac": {"window": 32, "band": 16, "min_context": 64, "threshold": 0.5, "audit": 1.0}}
    events = [harness.Add(0, "a", text("a", 700), 24), harness.Add(0, "b", text("b", 300), 24)]
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    with harness.engine(
        byte_model, "v2", "MAC", config, dtype="float16", enforce_eager=False, async_scheduling=False, enable_sleep_mode=True,
        compilation_config=graphs,
    ) as llm:  # fmt: skip
        layers = mac_layers(harness.worker(llm).vllm_config)
        lasting = {name: x.clone() for layer in layers if layer.decoder for name, x in layer.decoder.lasting().items()}
        assert lasting.keys() > {"hits_arrived", "misses_arrived", "slack", "spared", "edges"}

        def heads():
            counts = torch.stack([layer.counts for layer in layers]).cpu()
            return counts[:, :5].sum(1), torch.stack([layer.audited[:-2].sum() for layer in layers]).cpu(), counts[:, 0]

        warm_up, _, _ = heads()  # vLLM runs requests of its own before it serves
        run = harness.run_schedule(llm, [*events, harness.Preempt(12)], logprobs=2)
        decoded, audited, hits = heads()
        slept = harness.run_schedule(llm, [*events, harness.Sleep(12, 2)], logprobs=2)
        assert set(run.preempted) == {"a", "b"} and all(len(tokens) == 24 for tokens in slept.tokens.values())
        assert all(abs(x) < torch.inf for values in slept.logprobs.values() for x in values)  # neither infinite nor NaN
        now_decoded, now_audited, now_hits = heads()
        assert torch.equal(now_decoded - decoded, decoded - warm_up) and torch.equal(now_audited, now_hits)
        assert bool((now_hits > hits).all()) and torch.equal(audited, hits)
        found = {name: x for layer in layers if layer.decoder for name, x in layer.decoder.lasting().items()}
        assert all(torch.equal(found[name], x) for name, x in lasting.items())
