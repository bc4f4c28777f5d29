"""What maps were learned from outlasts an engine: the file that `maps` names."""

import pytest
import torch
from safetensors.torch import save_file

from support import engine as harness
from support.engine import Add
from support.index_engine import CONFIG, check_pages, counts, forget, layers
from support.scenarios import text
from vllm_mac import kv_group, maps_file
from vllm_mac.config_files import MacConfigError
from vllm_mac.key_index import Lessons, Moments

MODEL = "small"
OPTIONS = {"prefix_caching": True}
FIRST, LATER = [Add(0, "first", text("first", 500), 4)], [Add(0, "later", text("later", 130), 12)]


def moments(seed: int) -> Moments:
    draw = torch.Generator().manual_seed(seed)
    return Moments.of(torch.randn(90, 4, 32, generator=draw), torch.randn(2, 90, 32, generator=draw))


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "maps.safetensors"
    kept = {
        "model.layers.0": (moments(0), Lessons(3, 900, 400, 1)),
        "model.layers.1": (moments(1), Lessons(1, 300, 300)),
    }
    maps_file.write(path, MODEL, kept)
    return path, kept


def test_what_was_written_is_read(written):
    path, kept = written
    found = maps_file.read(path, MODEL)
    assert {name: lessons for name, (_, lessons) in found.items()} == {name: one for name, (_, one) in kept.items()}
    for name, (tensors, _) in kept.items():
        assert all(map(torch.equal, found[name][0].tensors(), tensors.tensors()))
    assert [x.name for x in path.parent.iterdir()] == ["maps.safetensors"] and path.stat().st_mode & 0o777 == 0o644
    assert maps_file.read(path.with_name("none.safetensors"), MODEL) == {}


@pytest.mark.parametrize(
    "rank, workers, name",
    [(0, 1, "maps.safetensors"), (1, 4, "maps-1-of-4.safetensors"), (3, 4, "maps-3-of-4.safetensors")],
)
def test_each_worker_has_a_file(rank, workers, name):
    assert maps_file.path_of("folder/maps.safetensors", rank, workers).as_posix() == f"folder/{name}"


def test_files_that_are_wrong_are_named(written):
    path, _ = written
    wrong = {
        path.parent / "absent" / "maps": "no folder at",
        path.parent: "a directory",
        path.with_name("text"): "cannot be read",
        path.with_name("other"): "not of format 'vllm-mac maps 1'",
    }
    path.with_name("text").write_text("not tensors at all, but some text")
    save_file({"x": torch.zeros(1)}, path.with_name("other"))
    for at, reason in wrong.items():
        with pytest.raises(MacConfigError, match=f"^maps: received '{at}': {reason}"):
            maps_file.read(at, MODEL)
    with pytest.raises(MacConfigError, match="learned from small, and this is large; must be of the same model"):
        maps_file.read(path, "large")


def test_a_file_that_cannot_be_written_keeps_what_was_there(written, monkeypatch):
    path, kept = written
    before = path.read_bytes()

    def full(tensors, part, metadata):
        part.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(maps_file, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        maps_file.write(path, MODEL, kept)
    assert path.read_bytes() == before and [x.name for x in path.parent.iterdir()] == ["maps.safetensors"]


@pytest.mark.cpu
@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_an_engine_knows_what_the_one_before_it_learned(model, tmp_path, monkeypatch, runner):
    """Its first request is looked up from its first step on; more teach."""
    path = tmp_path / "maps.safetensors"
    config = {"mac": CONFIG | {"maps": str(path)}}
    with harness.engine(model, runner, "MAC", config, rule=None, **OPTIONS) as llm:
        assert not any(layer.index.maps.ready for layer in layers(llm)) and not path.exists()
        harness.run_schedule(llm, FIRST)
        made = [{name: x.clone() for name, x in layer.index.maps.own().items()} for layer in layers(llm)]
        assert len(maps_file.read(path, model.name)) == len(made) == 2
    writings = []
    write = maps_file.write
    monkeypatch.setattr(maps_file, "write", lambda *args: writings.append(args) or write(*args))
    with harness.engine(model, runner, "MAC", config, rule=None, **OPTIONS) as llm:
        for layer, own in zip(layers(llm), made, strict=True):
            assert all(torch.equal(x, own[name]) for name, x in layer.index.maps.own().items())
            assert layer.group.taught == Lessons(1, 500, 500)
        forget(llm)
        run = harness.run_schedule(llm, LATER)
        found = counts(llm)
        assert found["HIT"] == 11 * sum(layer.num_heads for layer in layers(llm)) and found["NO_MAPS"] == 0
        assert len(run.tokens["later"]) == 12 and check_pages(llm) > 3
        # Of the four texts that taught the last makes maps anew.
        for i in range(2):
            harness.run_schedule(llm, [Add(0, f"more {i}", text(f"more {i}", 300), 4)])
        assert layers(llm)[0].group.taught.texts == 4 and len(writings) == 1
        assert maps_file.read(path, model.name)[layers(llm)[0].name][1].texts == 4


@pytest.mark.cpu
def test_layers_begin_anew_where_some_have_nothing_to_begin_with(model, tmp_path):
    """As when `layers` excluded one before. The other's maps stay until there are new ones."""
    path = tmp_path / "maps.safetensors"
    config = {"mac": CONFIG | {"maps": str(path)}}
    with harness.engine(model, "v1", "MAC", config, rule=None, **OPTIONS) as llm:
        harness.run_schedule(llm, FIRST)
    kept = maps_file.read(path, model.name)
    maps_file.write(path, model.name, dict(list(kept.items())[1:]))
    with harness.engine(model, "v1", "MAC", config, rule=None, **OPTIONS) as llm:
        assert [int(layer.index.maps.ready) for layer in layers(llm)] == [0, 1]
        assert layers(llm)[0].group.taught == Lessons()
        harness.run_schedule(llm, LATER)
        assert all(layer.index.maps.ready for layer in layers(llm))
        found = [layer.index.maps.moments for layer in layers(llm)]
    assert all(torch.isfinite(x).all() and x.any() for one in found for x in one.tensors())
    assert {lessons for _, lessons in maps_file.read(path, model.name).values()} == {Lessons(1, 130, 130)}


@pytest.mark.cpu
def test_shapes_of_another_model_are_refused(model, tmp_path):
    path, name = tmp_path / "maps.safetensors", "model.layers.0.self_attn.attn"
    one_head = Moments(*(x[:1] for x in moments(0).tensors()))
    maps_file.write(path, model.name, {name: (one_head, Lessons(1, 300, 300))})
    config = {"mac": CONFIG | {"maps": str(path)}}
    with (
        pytest.raises(MacConfigError, match=f"maps: received .*: {name} has shapes .*; must be of this model"),
        harness.engine(model, "v1", "MAC", config, rule=None, **OPTIONS),
    ):
        pass


def test_an_engine_goes_on_where_nothing_can_be_kept(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(kv_group.logger, "warning_once", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(kv_group, "mac_layers", lambda _: [])
    monkeypatch.setattr(maps_file, "own_path", lambda *_: tmp_path / "absent" / "maps")
    monkeypatch.setattr(maps_file, "model_of", lambda _: MODEL)
    kv_group.keep_maps(None, "maps")
    assert len(said) == 1 and said[0].startswith(
        f"MAC cannot keep in {tmp_path}/absent/maps what maps were learned from:"
    )
