"""The files that a configuration comes from: where they are found, and how they are read."""

import os
import reprlib
from pathlib import Path

import yaml

_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


class MacConfigError(ValueError):
    """The configuration is wrong. The message lists every problem found."""


def bundled_configs() -> dict[str, Path]:
    """The YAML files that come with the package, by the name that selects each."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    # In a checkout the folder lies beside the package.
    folder = installed if installed.is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(location: object, named_by: str) -> Path:
    """The file at a path, or else the bundled one of that name. named_by: what gave the location, for errors."""
    bundled = bundled_configs()
    choices = f"must be a YAML file, or one of the bundled {', '.join(bundled)}"
    if not isinstance(location, str):
        raise MacConfigError(f"{named_by}: received {show(location)}; {choices}")
    path = os.path.expanduser(location)
    if os.path.exists(path) and not os.path.isdir(path):
        return Path(path)
    if location in bundled:
        return bundled[location]
    fault = "a directory" if os.path.isdir(path) else "no file"
    raise MacConfigError(f"{named_by}: received {location!r}: {fault} at {os.path.abspath(path)}; {choices}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML readers keep the last of two equal keys in silence; here they are an error."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in first:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r}, first on line {first[key.tag, key.value]}",
                    problem_mark=key.start_mark,
                )
            first[key.tag, key.value] = key.start_mark.line + 1
        return node


def read(path: Path, source: str) -> object:
    """What a YAML file holds. source: what errors call the file."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise MacConfigError(f"{source}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise MacConfigError(f"{source}{where}: not valid YAML: {error.problem}") from error
    # Bytes that are no UTF-8, and scalars such as the date 2020-13-45, raise ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MacConfigError(f"{source}: not valid YAML: {error}") from error


def show(value: object) -> str:
    """A value as errors show it, with its type."""
    return f"{_SHORT.repr(value)} ({type(value).__name__})"
