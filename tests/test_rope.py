"""Undoing RoPE: against vLLM's own rotary modules, and what is refused."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import models
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope

from support.vllm_sources import VERSIONS, folder
from vllm_mac.rope import ROTATES, SECTIONS, Rotary, RotaryError, check, find_rotary

HEADS, SIZE, LENGTH = 3, 64, 512
U32 = 2.0**-24
ROUNDOFF = {torch.float32: U32, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, large factor": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32, "attention_factor": 3.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": 128},
    "dynamic, alpha": {"rope_type": "dynamic", "alpha": 1000.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "mrope": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "mrope, interleaved": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
}  # fmt: skip


def find(holder, has_rope: bool, head_size: int, length: int = LENGTH, media: bool = False) -> Rotary:
    """As for requests of text, no longer than the modules below are made for."""
    return find_rotary(holder, has_rope, head_size, length, media)


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def make(kind: str, dtype=torch.float32, neox: bool = True) -> nn.Module:
    return get_rope(SIZE, LENGTH, is_neox_style=neox, rope_parameters=dict(KINDS[kind]), dtype=dtype)


def bound(r: torch.Tensor, u: float) -> torch.Tensor:
    """Largest error of undoing a rotation that was computed with unit roundoff `u`.

    r: norm of each pair (x, y). The pair becomes (x c - y s, y c + x s), and each of the two has
    two rounded products and one rounded sum: 2u (|x c| + |y s|) <= 2u r m, m^2 = c^2 + s^2.
    The inverse divides by m: both errors together come back as at most 2 sqrt(2) u r. It
    computes in float32 itself: m^2 (3 roundings), c / m^2 (1), product and sum (2), on numbers
    that add up to at most sqrt(2) r: 6 sqrt(2) u32 r. The cache's own rounding divides out.
    """
    return 2**0.5 * (2 * u + 6 * U32) * r


def pairs(query: torch.Tensor, module) -> torch.Tensor:
    """The norm of the pair that each rotated element is in, `[N, H, E]`."""
    x = query.float()[..., : module.rotary_dim]
    if module.is_neox_style:
        a, b = x.chunk(2, -1)
        return (a**2 + b**2).sqrt().repeat(1, 1, 2)
    return (x[..., 0::2] ** 2 + x[..., 1::2] ** 2).sqrt().repeat_interleave(2, -1)


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gpt-j"])
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_undo_inverts_the_module_that_the_model_runs(kind, dtype, neox):
    module = make(kind, dtype, neox)
    last = len(module.cos_sin_cache) - 1
    position = torch.tensor([0, 1, 2, 77, 255, LENGTH - 1, last])
    query = torch.randn(len(position), HEADS, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = query.flatten(1).clone()
    rotated, _ = module(position, given, given.clone())  # the path this platform takes, in place or not
    rotated = rotated.view_as(query)
    assert (rotated - query).abs().max() > 0.5, "nothing was rotated"

    rotary = find(SimpleNamespace(rotary_emb=module), True, SIZE)
    before = rotated.clone()
    undone = rotary.undo(rotated, position)
    assert undone.dtype == torch.float32 and torch.equal(rotated, before)
    size = module.rotary_dim
    assert torch.equal(undone[..., size:], query[..., size:].float())
    off = (undone - query.float())[..., :size].abs()
    limit = bound(pairs(query, module), ROUNDOFF[dtype])
    assert (off <= limit).all(), float((off / limit).max())


def test_the_kinds_are_what_they_say():
    """Each kind differs from plain RoPE where it should, so that the test above is not one test."""
    plain, caches = make("default"), {}
    for kind in KINDS:
        module = make(kind)
        caches[kind] = module.cos_sin_cache
        assert (module.rotary_dim == SIZE) == (kind != "partial")
    same = {k for k, c in caches.items() if c.shape[1] == SIZE and torch.equal(c[:32], plain.cos_sin_cache[:32])}
    assert same == {"default", "mrope", "mrope, interleaved"}
    norm = caches["yarn, large factor"].chunk(2, -1)
    assert ((norm[0] ** 2 + norm[1] ** 2) > 8).all(), "an attention factor of 3"


def test_distances_before_rope_do_not_depend_on_position():
    """What matching needs: one query at two positions is one query again."""
    module = make("llama3")
    query = torch.randn(1, HEADS, SIZE, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1)
    position = torch.tensor([17, 400])
    rotated, _ = module(position, query.flatten(1).clone(), query.flatten(1).clone())
    rotated = rotated.view(2, HEADS, SIZE)
    assert (rotated[0] - rotated[1]).norm(dim=-1).min() > 1
    a, b = Rotary(module).undo(rotated, position)
    assert ((a - b).norm(dim=-1) <= 2 * bound(pairs(query, module), U32)[0].norm(dim=-1)).all()


def test_mrope_on_text_is_undone_by_its_one_position():
    module = make("mrope")
    position = torch.tensor([3, 300])
    query = torch.randn(2, HEADS, SIZE, generator=torch.Generator().manual_seed(2))
    # What the model passes for text: three equal rows.
    rotated, _ = module(position.expand(3, -1), query.flatten(1).clone(), query.flatten(1).clone())
    undone = Rotary(module).undo(rotated.view_as(query), position)
    assert ((undone - query).abs() <= bound(pairs(query, module), U32)).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("mrope")])
def test_positions_after_an_image_are_not_the_sequence_s(kind):
    """So a module that takes several is left alone wherever a request may hold an image, and only there."""
    module = make(kind)
    query = torch.randn(2, HEADS, SIZE, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([40, 41])  # after an image of 30 tokens, whose rows and columns end at 11
    for position in (
        torch.stack((index, index - 19, index - 20)),
        (index - 19).expand(3, -1),
    ):  # within it, and after it
        rotated, _ = module(position, query.flatten(1).clone(), query.flatten(1).clone())
        undone = Rotary(module).undo(rotated.view_as(query), index)
        assert (undone - query).norm() > 0.2 * query.norm()
    assert find(Holder(rotary_emb=module), True, SIZE).module is module
    said = "MRotaryEmbedding rotates by positions that attention is not told.*--language-model-only"
    with pytest.raises(RotaryError, match=said) as e:
        find(Holder(rotary_emb=module), True, SIZE, media=True)
    assert e.value.reason == "mrope"
    plain = make("llama3")  # a model that takes images, and counts their tokens like others
    assert find(Holder(rotary_emb=plain), True, SIZE, media=True).module is plain


@pytest.mark.parametrize("version", VERSIONS)
def test_every_module_of_several_positions_is_known_by_its_sections(version):
    """In vLLM's sources: a class that asks how many rows its positions have has the attribute, or inherits it."""
    classes = {}
    for path in (folder(version) / "vllm/model_executor/layers/rotary_embedding").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node

    def mentions(name: str, attribute: str, of: str) -> bool:
        return any(
            ast.unparse(node) == f"{of}.{attribute}"
            for node in ast.walk(classes[name])
            if isinstance(node, ast.Attribute)
        )

    def has_sections(name: str) -> bool:
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name) and base.id in classes]
        return mentions(name, SECTIONS, "self") or any(map(has_sections, bases))

    several = [name for name in classes if mentions(name, "ndim", "positions")]
    assert {"MRotaryEmbedding", "BailingMRotaryEmbedding", "Ernie4_5_VLRotaryEmbedding"} <= set(several)
    assert all(map(has_sections, several))


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_a_cache_shorter_than_sequences_is_refused(dtype):
    """Where vLLM reads what lies behind it (VLLM_ALLOW_LONG_MAX_MODEL_LEN), nothing is undone."""
    module = make("default", dtype)
    assert find(Holder(rotary_emb=module), True, SIZE, length=512).module is module
    with pytest.raises(
        RotaryError, match="RotaryEmbedding.cos_sin_cache holds 512 positions, and --max-model-len is 513"
    ) as e:
        find(Holder(rotary_emb=module), True, SIZE, length=513)
    assert e.value.reason == "rotary"
    assert len(make("linear").cos_sin_cache) == 1024
    find(Holder(rotary_emb=make("linear")), True, SIZE, length=1024)


# --- find_rotary --------------------------------------------------------------------------------


class Holder(nn.Module):
    """Stands for a model's attention module."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def undoes_nothing(rotary: Rotary) -> bool:
    query = torch.randn(2, 1, SIZE, dtype=torch.bfloat16)
    undone = rotary.undo(query, torch.tensor([5, 6]))
    return rotary.module is None and undone.dtype == torch.float32 and torch.equal(undone, query.float())


def test_a_model_without_rope():
    assert undoes_nothing(find(Holder(), has_rope=False, head_size=SIZE))


def test_rope_somewhere_else_is_refused():
    with pytest.raises(RotaryError, match="Holder has no rotary_emb"):
        find(Holder(), has_rope=True, head_size=SIZE)


def test_a_layer_without_rotation_in_a_model_with_rope():
    assert undoes_nothing(find(Holder(rotary_emb=None), has_rope=True, head_size=SIZE))


@pytest.mark.parametrize("flag", ROTATES)
def test_a_flag_of_the_model_turns_rotation_off(flag):
    module = make("default")
    off = Holder(rotary_emb=module, **{flag: False})
    assert undoes_nothing(find(off, has_rope=True, head_size=SIZE))
    on = find(Holder(rotary_emb=module, **{flag: True}), has_rope=True, head_size=SIZE)
    assert on.module is module


def test_every_switch_of_the_installed_vllm_is_known():
    """Attributes that decide, in vLLM's models, whether `rotary_emb` is called.

    A switch that `find_rotary` does not know would have it undo what was never done.
    """
    # Absent or None where there is no rotation; sliding-window and KV-sharing layers, which MAC
    # does not serve; another way to the same rotation; a loop that rotates on both branches; a
    # configuration without which there is no `rotary_emb` at all.
    harmless = {"rotary_emb", "sliding_window", "is_kv_shared_layer", "hpc_rope_norm", "config"}
    switches = set()

    def visit(node: ast.AST, tests: tuple) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rotary_emb":
            for test in tests:
                for part in ast.walk(test):
                    if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                        switches.add(part.attr)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    branch = isinstance(node, (ast.If, ast.IfExp)) and name in ("body", "orelse")
                    visit(child, (*tests, node.test) if branch else tests)

    for path in Path(models.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "rotary_emb(" in source:
            visit(ast.parse(source), ())
    assert {"use_rope", "use_rotary"} <= switches, "the search finds what is known to be there"
    assert switches - harmless <= set(ROTATES)


class Lying(nn.Module):
    """A rotary module whose cache is not what it rotates by."""

    def __init__(self, honest: nn.Module):
        super().__init__()
        self.honest, self.rotary_dim, self.is_neox_style = honest, honest.rotary_dim, honest.is_neox_style
        self.cos_sin_cache = honest.cos_sin_cache.roll(1, 0)

    def forward_native(self, position, query, key):
        return self.honest.forward_native(position, query, key)


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_a_cache_that_lies_is_found_out(dtype):
    with pytest.raises(RotaryError, match="not undone by its cos_sin_cache"):
        find(Holder(rotary_emb=Lying(make("default", dtype))), True, SIZE)


def test_the_wrong_pairing_is_found_out():
    lying = Lying(make("default"))
    lying.cos_sin_cache = lying.honest.cos_sin_cache
    check(Rotary(lying), SIZE)  # honest now
    lying.is_neox_style = False
    with pytest.raises(RotaryError, match="not undone"):
        check(Rotary(lying), SIZE)


def test_a_cache_of_another_shape_is_refused():
    lying = Lying(make("partial"))
    lying.rotary_dim = SIZE
    with pytest.raises(RotaryError, match=r"cos_sin_cache is \[512, 16\], not \[positions, 64\]"):
        check(Rotary(lying), SIZE)


def test_a_module_that_fails_on_plain_positions_is_refused():
    failing = Lying(make("default"))
    failing.forward_native = lambda *_: 1 // 0
    with pytest.raises(RotaryError, match="failed on plain positions: ZeroDivisionError"):
        check(Rotary(failing), SIZE)


@pytest.mark.parametrize("max_model_len", [64, 512], ids=["short factors", "long factors"])
def test_longrope_is_refused(monkeypatch, max_model_len):
    """Phi-3 keeps two caches, of short and of long factors, and none that undo could use."""
    engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: engine)
    parameters = {
        "rope_type": "longrope", "original_max_position_embeddings": 128, "rope_theta": 10000 + max_model_len,
        "short_factor": [1.0] * (SIZE // 2), "long_factor": [2.0] * (SIZE // 2),
    }  # fmt: skip
    module = get_rope(SIZE, LENGTH, rope_parameters=parameters, dtype=torch.float32)
    assert type(module).__name__ == "Phi3LongRoPEScaledRotaryEmbedding"
    with pytest.raises(RotaryError, match="Phi3LongRoPEScaledRotaryEmbedding has no cos_sin_cache"):
        find(Holder(rotary_emb=module), True, SIZE)
