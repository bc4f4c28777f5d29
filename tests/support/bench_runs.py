"""What the tests of `vllm-mac bench` share: its command line, and engines that are not there."""

import sys

from typer.testing import CliRunner

from vllm_mac.tools import cli
from vllm_mac.tools.bench import decode

PROVENANCE = {"gpu", "driver", "vllm", "torch", "triton", "flashinfer", "commit", "command", "timestamp"}


def invoke(*args):
    return CliRunner().invoke(cli.app, ["bench", *args], env={"COLUMNS": "300"})


def fake_engine(monkeypatch, body):
    """In place of an engine's process: `body` with `tell(**message)` and `spec`."""
    code = (
        "import json, os, sys, time\nspec, fd = json.load(open(sys.argv[1])), int(sys.argv[2])\n"
        "tell = lambda **m: os.write(fd, (json.dumps(m) + '\\n').encode())\n" + body
    )
    monkeypatch.setattr(decode, "COMMAND", (sys.executable, "-c", code))


RESULT = (
    "dict(step_ms=[1.0, 2.0, 4.0], ttft_ms=[7.0], metadata_ms=[0.1], graph_ms=[0.5], hit_rate=0.5, read_share=0.25)"
)
EACH = f"""
for i, _ in enumerate(spec["shapes"]):
    tell(shape=i, result={RESULT})
tell(done=True)"""
