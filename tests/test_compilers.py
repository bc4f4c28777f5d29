"""What a user is told where kernels cannot be compiled on a GPU: FlashInfer, caches, a compiler that fails."""

import os
import runpy
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import vllm.platforms

from support import ROOT
from support.stub_flashinfer import gpu_backend
from vllm_mac import compilers, lookup_decoder, startup
from vllm_mac.config import MacConfig
from vllm_mac.key_index import Lessons
from vllm_mac.state import Geometry, IndexRule

pytestmark = pytest.mark.cpu


def test_folders_are_those_that_the_compilers_use():
    """Triton's own answer; FlashInfer's is in its sources, `flashinfer/jit/env.py`."""
    from triton import knobs

    triton, flashinfer = compilers.caches()
    assert str(triton.folder) == knobs.cache.dir
    named = {"HOME": "/home/x", "TRITON_CACHE_DIR": "/a", "FLASHINFER_WORKSPACE_BASE": "/b"}
    assert [str(x.folder) for x in compilers.caches(named)] == ["/a", "/b/.cache/flashinfer"]
    assert [str(x.folder) for x in compilers.caches({"HOME": "/h", "TRITON_HOME": "/t"})] == [
        "/t/.triton/cache", "/h/.cache/flashinfer",
    ]  # fmt: skip


def environ(folder) -> dict:
    return {"HOME": str(folder), "TRITON_CACHE_DIR": str(folder / "triton" / "new")}


def test_folders_that_can_be_made_are_none_to_warn_of(tmp_path):
    assert [*compilers.unwritable(environ(tmp_path / "absent"))] == []


@pytest.mark.parametrize("read_only", [True, False])
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, read_only):
    """On a read-only file system, which `os.access` knows of whoever asks; and a file in a folder's place."""
    if read_only:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        (tmp_path / "triton").write_text("")
        (tmp_path / ".cache").write_text("")
    assert [x.variable for x in compilers.unwritable(environ(tmp_path))] == [
        "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE",
    ]  # fmt: skip


@pytest.mark.parametrize("cuda", [True, False])
def test_the_start_warns_of_them(tmp_path, monkeypatch, cuda):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cuda=lambda: cuda))
    said = []
    monkeypatch.setattr(startup.logger, "warning_once", lambda text, *values: said.append(text % values))
    startup._warn_of_caches()
    assert len(said) == cuda and all(f"{tmp_path}/file/cache, which cannot be written" in x for x in said)
    assert all("Set TRITON_CACHE_DIR to" in x for x in said)


@pytest.mark.parametrize("error, told", [
    ("No module named 'flashinfer'", True), ("cannot import name 'get_seq_lens' from 'flashinfer'", True),
    ("flashinfer-cubin version (0.6.1) does not match flashinfer version (0.7.0)", True),
    ("no such operator", False),
])  # fmt: skip
def test_a_flashinfer_that_is_absent_or_another_is_named(monkeypatch, error, told):
    def fail(name, *args):
        raise RuntimeError(error)

    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    monkeypatch.delitem(sys.modules, "vllm_mac.cuda", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=lambda name, path, target=None: (
        fail(name) if name == "vllm_mac.cuda" else None
    )), *sys.meta_path])  # fmt: skip
    with pytest.raises(ImportError if told else RuntimeError) as caught:
        runpy.run_path(str(ROOT / "vllm_mac" / "backend.py"))
    assert error in str(caught.value)
    assert not told or (
        "MAC needs FlashInfer on GPUs" in str(caught.value) and compilers.FLASHINFER in str(caught.value)
    )


def test_a_kernel_that_does_not_compile_ends_the_start(monkeypatch, tmp_path):
    """Not a request later; the error names what failed, and the folder that cannot be written if that is why."""
    cuda = gpu_backend()
    geometry = Geometry(4, 6, 2, 64, 16, 32, torch.float32, 64, 16, 0.125)
    decoder = cuda.LookupDecoder(geometry, IndexRule(1.5, 64, 16, 128, 0.125), None, torch.device("cpu"))
    layer = SimpleNamespace(served=True, config=MacConfig(), by_index=MagicMock(), drafting=None, apart=False)
    monkeypatch.setattr(cuda, "at_once", lambda _: 1)

    def base(self, spec, names, vllm_config, device):
        self.page_size = 16

    def fail(*_, **__):
        raise PermissionError(30, "Read-only file system", "/home/x/.triton/cache/A")

    monkeypatch.setattr(cuda.FlashInferMetadataBuilder, "__init__", base)
    monkeypatch.setattr(cuda, "Group", lambda *_: SimpleNamespace(layers=[layer], lessons=Lessons(3, 900, 400)))
    monkeypatch.setattr(cuda, "decoder_of", lambda *_: decoder)
    monkeypatch.setattr(torch.cuda, "Event", MagicMock)
    monkeypatch.setattr(lookup_decoder, "encode", fail)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    eager = SimpleNamespace(
        kernel_config=SimpleNamespace(enable_jit_warmup=False), model_config=SimpleNamespace(enforce_eager=True)
    )
    with pytest.raises(RuntimeError) as caught:
        cuda.MacCUDAMetadataBuilder(None, ["layer"], eager, torch.device("cpu"))
    text = str(caught.value)
    assert "MAC's kernels cannot be compiled or launched here" in text and "Read-only file system" in text
    assert f"{tmp_path}/file/cache cannot be written, set TRITON_CACHE_DIR" in text
    assert "leave --attention-backend MAC out" in text and isinstance(caught.value.__cause__, PermissionError)
    assert decoder.lessons == Lessons(3, 900, 400)  # what its layers began with
