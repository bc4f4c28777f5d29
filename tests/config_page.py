"""Writes configs/README.md from `MacConfig`: `python tests/config_page.py`. A test compares the two."""

import json
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's, not a copy that is installed

from vllm_mac.config import LayerSelection, MacConfig
from vllm_mac.config_files import bundled_configs

PAGE = Path(__file__).resolve().parent.parent / "configs" / "README.md"

HEAD = """# Configuration

Keys come from the defaults, then a YAML file (`config`, or the environment variable `MAC_ATTENTION_CONFIG`), then the inline
keys. `config` is the name of a bundled file or a path.

```
vllm serve MODEL --attention-backend MAC --additional-config '{"mac": {"tolerance": 1.0}}'
vllm serve MODEL --attention-backend MAC --additional-config '{"mac": {"config": "long_reasoning", "window": 1024}}'
```

| bundled file | |
| --- | --- |
"""

KEYS = """
A wrong key, type or value stops the start with an error that names it and the choices. Lengths are in tokens.
`default.yaml` says more about each key. This table is generated from the code (`python tests/config_page.py`).

`match:` and `index:` begin what is said of a key that only that `rule` reads. Given with the other rule, such a key
is an error too, whatever its value: leave it out, or set `rule`. A file that has every key, such as a copy of
`default.yaml`, may keep the other rule's keys at their defaults.

| key | values | default | |
| --- | --- | --- | --- |
"""


def page() -> str:
    files = "".join(f"| `{name}` | {_about(path)} |\n" for name, path in sorted(bundled_configs().items()))
    keys = [*_rows(MacConfig, ""), *_rows(LayerSelection, "layers.")]
    return HEAD + files + KEYS + "".join(keys)


def _about(path: Path) -> str:
    """The first paragraph of a file's opening comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines).split(". ")[0].rstrip(".") + "."


def _rows(section, prefix: str):
    for name, field in section.model_fields.items():
        if field.annotation is LayerSelection:
            continue
        default = field.get_default()
        assert default is not PydanticUndefined
        told = {"include": None, "exclude": [], "threshold": {}}[name] if prefix else default
        yield f"| `{prefix}{name}` | {_values(field)} | `{json.dumps(told)}` | {field.description} |\n".replace(
            "|q-q'|", "\\|q-q'\\|"
        )


def _values(field) -> str:
    """What may be given, in words."""
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{kind}`" for kind in kinds)
    limits = {
        name: getattr(rule, name)
        for rule in field.metadata
        for name in ("ge", "gt", "le", "multiple_of")
        if hasattr(rule, name)
    }
    words = [f"at least {limits['ge']:g}"] if "ge" in limits else []
    words += [f"above {limits['gt']:g}"] if "gt" in limits else []
    words += [f"at most {limits['le']:g}"] if "le" in limits else []
    name = {bool: "true, false", int: "whole number", float: "number", str: "path"}.get(kinds[0])
    words += [f"in steps of {limits['multiple_of']}"] if "multiple_of" in limits else []
    if name is None:  # the keys below `layers`
        name = (
            "patterns, each with a number from 0 to 1"
            if "thresholds of layers" in (field.description or "")
            else "list of patterns"
        )
    nullable = " or `null`" if type(None) in get_args(field.annotation) else ""
    return f"{name}{' ' if words else ''}{' and '.join(words)}{nullable}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
