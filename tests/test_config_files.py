"""Where the configuration's values come from: files, the environment, inline keys; and the bundled files."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from support.configs import DEFAULTS, keys_of, refusal
from vllm_mac.config import (
    ENV_VAR,
    INLINE,
    MacConfig,
    resolve,
)
from vllm_mac.config_files import bundled_configs

# Where values come from


def test_inline_overrides_the_file_and_the_file_the_defaults(yaml_file):
    path = yaml_file("rule: match\nwindow: 1024\nband: 128\nthreshold: 0.6\n")
    config = resolve({"config": path, "band": 64}, {})
    assert keys_of(config) == DEFAULTS | {"rule": "match", "window": 1024, "band": 64, "threshold": 0.6}


def test_inline_layers_replace_the_whole_value_of_the_file(yaml_file):
    path = yaml_file("layers:\n  include: [0-3]\n  exclude: [1]\n")
    from_file = resolve({"config": path}, {}).layers
    assert (from_file.include, from_file.exclude) == (("0-3",), (1,))
    inline = resolve({"config": path, "layers": {"exclude": [2]}}, {}).layers
    assert (inline.include, inline.exclude) == (None, (2,))


def test_the_environment_names_a_file_unless_config_does(yaml_file):
    by_environ, by_key = yaml_file("band: 7\n", "a.yaml"), yaml_file("band: 9\n", "b.yaml")
    environ = {ENV_VAR: by_environ}
    assert keys_of(resolve(None, environ)) == DEFAULTS | {"band": 7}
    assert keys_of(resolve({"config": None}, environ)) == DEFAULTS | {"band": 7}
    assert keys_of(resolve({"config": by_key}, environ)) == DEFAULTS | {"band": 9}
    assert keys_of(resolve(None, {ENV_VAR: ""})) == DEFAULTS


def test_the_process_environment_is_read_by_default(yaml_file, monkeypatch):
    monkeypatch.setenv(ENV_VAR, yaml_file("band: 7\n"))
    assert resolve().band == 7


def test_a_wrong_value_of_a_file_names_the_file_and_what_named_it(yaml_file):
    path = yaml_file("band: 0\n")
    assert f"band: received 0 (int) from {path} (named by {ENV_VAR})" in refusal(None, {ENV_VAR: path})
    assert f"from {path} (named by {INLINE}.config)" in refusal({"config": path})


def test_inline_keys_are_left_as_they_were():
    inline = {"config": "default", "band": 7}
    resolve(inline, {})
    assert inline == {"config": "default", "band": 7}


def test_a_path_may_be_relative_or_start_at_home(yaml_file, tmp_path, monkeypatch):
    yaml_file("band: 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve({"config": "mac.yaml"}, {}).band == 7
    assert resolve({"config": "~/mac.yaml"}, {}).band == 7


# Files that cannot be used


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n", "{}\n"])
def test_an_empty_file_has_no_keys(yaml_file, text):
    assert keys_of(resolve({"config": yaml_file(text)}, {})) == DEFAULTS


def test_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for message in (refusal({"config": "nope.yaml"}), refusal(None, {ENV_VAR: "nope.yaml"})):
        assert f"received 'nope.yaml': no file at {tmp_path / 'nope.yaml'}" in message
        assert "one of the bundled default, long_reasoning, paper" in message
    assert message.startswith(f"{ENV_VAR}: ")


def test_a_directory(tmp_path):
    message = refusal({"config": str(tmp_path)})
    assert message.startswith(f"{INLINE}.config: received {str(tmp_path)!r}: a directory at")


@pytest.mark.parametrize("location", [3, True, ["a.yaml"], ""])
def test_a_location_is_text(location):
    assert refusal({"config": location}).startswith(f"{INLINE}.config: received {location!r}")


def test_a_file_without_permission(yaml_file, monkeypatch):
    path = yaml_file("band: 7\n")

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)  # root reads whatever the mode says
    assert f"{path} (named by {INLINE}.config): cannot be read: Permission denied" in refusal({"config": path})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("window: 1\nband: [1\nsink: 0\n", ", line 3: not valid YAML"),
        ("window: 1\n\tband: 2\n", ", line 2: not valid YAML"),
        ("window: 1\n---\nwindow: 2\n", ", line 2: not valid YAML"),
        ("window: !!python/tuple [1]\n", ", line 1: not valid YAML"),
        ("window: *nowhere\n", ", line 1: not valid YAML"),
        ("[1]: 2\n? [3]\n: 4\n", ", line 1: not valid YAML"),
        ("window: 2020-13-45\n", "not valid YAML: month must be in"),
        ("window: 1\x00\n", "not valid YAML"),
        (b"window: \xff\xfe\xfa\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_yaml(yaml_file, text, says):
    path = yaml_file(text)
    message = refusal({"config": path})
    assert message.startswith(f"{path} (named by {INLINE}.config)")
    assert says in message


@pytest.mark.parametrize("text", ["- window\n", "window\n", "12\n", "true\n"])
def test_a_file_that_is_no_mapping(yaml_file, text):
    path = yaml_file(text)
    message = refusal({"config": path})
    assert f"{path} (named by {INLINE}.config): received {yaml.safe_load(text)!r}" in message
    assert "must be a mapping with keys from enabled" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("window: 1\nband: 2\nwindow: 1\n", ", line 3: not valid YAML: duplicate key 'window', "),
        ("{window: 1, window: 2}\n", ", line 1: not valid YAML: duplicate key 'window', "),
        ("layers:\n  exclude: [1]\n  exclude: [2]\n", ", line 3: not valid YAML: duplicate key"),
    ],
)
def test_a_key_given_twice(yaml_file, text, says):
    assert says in refusal({"config": yaml_file(text)})


def test_the_same_key_at_two_levels_is_no_duplicate(yaml_file):
    assert "duplicate" not in refusal({"config": yaml_file("layers: {window: 1}\nwindow: 2\n")})


def test_a_byte_order_mark_is_skipped(yaml_file):
    assert resolve({"config": yaml_file(b"\xef\xbb\xbfband: 7\n")}, {}).band == 7


# The bundled files


def test_the_default_file_states_every_default_and_explains_it():
    path = bundled_configs()["default"]
    text = path.read_text()
    assert yaml.safe_load(text) == DEFAULTS
    assert resolve({"config": "default"}, {}) == MacConfig()


def test_the_long_reasoning_file_states_only_what_it_changes():
    keys = yaml.safe_load(bundled_configs()["long_reasoning"].read_text())
    assert keys == {key: value for key, value in keys.items() if value != DEFAULTS[key]}
    config = resolve({"config": "long_reasoning"}, {})
    assert keys_of(config) == DEFAULTS | keys
    assert config.lag_weight > 0


@pytest.mark.parametrize("name", ["default", "long_reasoning", "paper"])
def test_every_key_of_a_bundled_file_has_a_comment_above_it(name):
    lines = bundled_configs()[name].read_text().splitlines()
    bare = [
        line
        for before, line in pairwise(["", *lines])
        if re.match(r"\s*\w+:", line) and not before.lstrip().startswith("#")
    ]
    assert bare == []


@pytest.mark.parametrize("name", ["long_reasoning", "paper"])
def test_a_bundled_file_of_the_paper_s_rule_says_so(name):
    assert yaml.safe_load(bundled_configs()[name].read_text())["rule"] == "match"
    assert resolve({"config": name}, {}).rule == "match"


def test_a_bundled_name_yields_to_a_file_but_not_to_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(None, {ENV_VAR: "long_reasoning"}).lag_weight > 0
    (tmp_path / "long_reasoning").mkdir()
    assert resolve({"config": "long_reasoning"}, {}).lag_weight > 0
    (tmp_path / "long_reasoning").rmdir()
    (tmp_path / "long_reasoning").write_text("band: 7\n")
    assert keys_of(resolve({"config": "long_reasoning"}, {})) == DEFAULTS | {"band": 7}
