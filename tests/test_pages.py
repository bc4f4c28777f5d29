"""The pages: their links lead somewhere, README can be skimmed, and every command in them is one that exists.

Commands are taken as the programs themselves take them: by vLLM's own parser, by that of `vllm-mac`, or by the
script that they name. Files that a reader brings are made up (`FILES`).
"""

import ast
import inspect
import json
import re
import shlex
import subprocess
import tomllib

import config_page
import pytest
import typer
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.benchmark.serve import BenchmarkServingSubcommand
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from support import ROOT
from vllm_mac.config import resolve
from vllm_mac.tools.cli import app

pytestmark = pytest.mark.cpu

PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any((part.startswith(".") and part != ".github") or part == "build" for part in path.relative_to(ROOT).parts)
)
FILES = {
    "my.yaml": "tolerance: 1.0\n",
    "mac.yaml": "rule: match\nthreshold: 0.9\n",
    "prompts.jsonl": '{"prompt": "Say one."}\n',
}


def blocks() -> list:
    """Each fenced block with its language."""
    found = []
    for page in PAGES:
        for i, (language, text) in enumerate(
            re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
        ):
            found.append(pytest.param(language, text, id=f"{page.relative_to(ROOT)}-{i}"))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a block, without comments, prompts and what is printed below them."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [part for words in lines for part in _split(words) if part]


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_vllm(words: list[str]) -> None:
    whole = FlexibleArgumentParser(prog="vllm")
    if words[:2] == ["bench", "serve"]:
        BenchmarkServingSubcommand.add_cli_args(whole)
        whole.parse_args(words[2:])
        return
    assert words[0] == "serve", words
    command = ServeSubcommand()
    command.subparser_init(whole.add_subparsers(dest="subparser"))
    parsed = whole.parse_args(words)
    command.validate(parsed)
    check_config(parsed.additional_config or {})


def check_config(additional: dict) -> None:
    assert additional.keys() <= {"mac"}
    resolve(additional.get("mac"))


def check_mac(words: list[str]) -> None:
    command = typer.main.get_command(app)
    context = command.make_context("vllm-mac", list(words))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), words
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def check_python(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), words


def check_pip(words: list[str]) -> None:
    assert words[0] == "install" and len(words) == 2, words
    if extra := re.fullmatch(r"\.\[(\w+)\]", words[1]):
        assert extra[1] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    else:
        assert words[1] in ("matplotlib", "pre-commit", ".")


def check_docker(words: list[str]) -> None:
    assert words[:2] == ["compose", "-f"] and (ROOT / words[2]).is_file(), words


def check_curl(words: list[str]) -> None:
    assert any(re.search(r"localhost:\d+/(metrics|v1/\w+)", word) for word in words), words


PROGRAMS = {
    "vllm": check_vllm,
    "vllm-mac": check_mac,
    "bash": check_script,
    "python": check_python,
    "pip": check_pip,
    "curl": check_curl,
    "docker": check_docker,
    "pre-commit": lambda words: (
        None if words in (["install"], ["run", "--all-files"]) else pytest.fail(f"pre-commit {words}")
    ),
    "git": lambda words: None if words[:2] == ["clone", "REPOSITORY"] else pytest.fail(f"git {words}"),
    "cd": lambda words: None if words == ["vllm-mac"] else pytest.fail(f"cd {words}"),
    "grep": lambda words: None if words == ["^vllm_mac"] else pytest.fail(f"grep {words}"),
}


@pytest.mark.parametrize("language, text", blocks())
def test_what_a_page_shows_is_what_programs_take(language, text, folder):
    if language == "python":
        check_code(text)
    elif language in ("", "bash", "sh"):
        for words in commands(text):
            while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                words = words[1:]
            assert words[0] in PROGRAMS, words
            PROGRAMS[words[0]](words[1:])
    elif language == "json":
        json.loads(text)
    else:
        assert language in ("yaml", "text"), language


def check_code(text: str) -> None:
    """Calls of `LLM` have parameters that it takes, and a configuration that MAC takes."""
    known = set(inspect.signature(LLM).parameters) | set(inspect.signature(EngineArgs).parameters)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM":
            keywords = {k.arg: k.value for k in node.keywords}
            assert keywords.keys() <= known
            if "additional_config" in keywords:
                check_config(ast.literal_eval(keywords["additional_config"]))


def test_links_lead_somewhere():
    assert len(PAGES) > 5
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_guide_names_files_that_exist():
    """Of what it writes in backticks, the paths; NAME and COMMAND stand for any."""
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    named = {path for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text) if not re.search("NAME|COMMAND", path)}
    assert {"vllm_mac/config.py", "kernels/hit.py", "configs/default.yaml"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists() and not path.startswith(".cache")] == []


def test_readme_can_be_skimmed():
    text = (ROOT / "README.md").read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 120] == []
    assert not re.search(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,12}\b", text), "a commit in prose"
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    assert not re.search(r"`(vllm serve|vllm-mac \w+ -|pip |curl )", prose), "a shell line inside a sentence"


def test_the_page_of_keys_is_that_of_the_code():
    assert config_page.PAGE.read_text("utf-8") == config_page.page(), "run: python tests/config_page.py"
