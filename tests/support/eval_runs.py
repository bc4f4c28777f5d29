"""What the tests of `vllm-mac eval` share: its command line, requests, and engines that are not there."""

import re
import sys

from typer.testing import CliRunner

from vllm_mac.tools import cli, resume
from vllm_mac.tools.eval import (
    evaluation,
    requests,
)

ENVIRONMENT = dict.fromkeys(resume.SAME) | {"commit": "0123456789ab", "command": "vllm-mac eval"}


def invoke(*args):
    result = CliRunner().invoke(cli.app, ["eval", *map(str, args)], env={"COLUMNS": "300"})
    return result.exit_code, re.sub(r"\s*│?\n│?\s*", " ", result.output)


def made(count=4):
    some = [
        requests.Request(f"ruler/99/niah_single/{i}", "ruler", "niah_single", 99, (1, 2, i), 5, "p", ("x",))
        for i in range(count)
    ]
    return [*some, requests.Request("prompts/1", "prompts", "prompts", None, (9,), 5, "go on")]


def options(tmp_path, **changes):
    return evaluation.Evaluation(
        **{"model": "m", "out": tmp_path / "out", "mac": {"one": {"threshold": 0.5}}} | changes
    )


def fake_engine(monkeypatch, dies="False", first=""):
    """An engine whose replies are always the request's number; `dies`: when, in terms of `name` and `count`.
    first: what it does before."""
    code = f"""
import json, os, sys
from pathlib import Path
spec, fd = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
folder = Path(spec["folder"]); name = folder.name; file = folder / "samples.jsonl"
{first}
done = {{json.loads(line)["id"] for line in file.read_text().splitlines()}} if file.exists() else set()
count = 0
for line in open(spec["requests"]):
    item = json.loads(line)
    if item["id"] in done:
        continue
    if {dies}:
        print("Traceback\\nValueError: out of luck"); os._exit(9)
    row = {{k: item[k] for k in ("id", "group", "task", "length", "answers")}}
    row |= {{"score": float(name == "exact") if item["answers"] else None, "tokens": [1, len(name)], "reply": "", "by": os.getpid()}}
    row |= {{"seconds": 1.0}} if spec["timed"] else {{}}
    with open(file, "a") as sink:
        sink.write(json.dumps(row) + "\\n")
    count += 1
os.write(fd, (json.dumps({{"stage": "all", "advance": count}}) + "\\n" + json.dumps({{"done": True}}) + "\\n").encode())
"""
    monkeypatch.setattr(evaluation, "COMMAND", (sys.executable, "-c", code))
