"""The file that keeps what maps of the index were learned from, so that an engine need not learn them anew.

It holds moments and no maps: these follow from them, whatever `index_size` is. A worker reads its file when it has loaded its
weights, and writes it whenever it has made maps. Of several workers each has a file of its own, as each has heads of its own.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from vllm.config import VllmConfig

from vllm_mac.config_files import MacConfigError
from vllm_mac.key_index import Lessons, Maps, Moments, learn

FORMAT = "vllm-mac maps 1"
Kept = dict[str, tuple[Moments, Lessons]]  # by the name of each layer


def model_of(vllm_config: VllmConfig) -> str:
    """The model's name without the folders before it, which differ from machine to machine."""
    return Path(vllm_config.model_config.model).name


def path_of(location: str, rank: int, workers: int) -> Path:
    """A worker's file. rank: of so many workers of one engine."""
    path = Path(location).expanduser()
    return path if workers == 1 else path.with_name(f"{path.stem}-{rank}-of-{workers}{path.suffix}")


def own_path(vllm_config: VllmConfig, location: str) -> Path:
    """The file of the worker that this process runs."""
    parallel = vllm_config.parallel_config
    workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    return path_of(location, parallel.rank % workers, workers)


def fault(path: Path, model: str) -> str | None:
    """Why a file at this path cannot be read or written, or None. There need not be one."""
    received = f"maps: received {str(path)!r}"
    if not path.parent.is_dir():
        return f"{received}: no folder at {path.parent.absolute()}; must be a file in a folder that is there, or null"
    if path.is_dir():
        return f"{received}: a directory; must be a file, or null"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        return f"{received}: cannot be read: {error}; must be a file that MAC wrote, or none yet"
    if found.get("format") != FORMAT:
        return f"{received}: not of format {FORMAT!r}; must be a file that MAC wrote, or none yet"
    if found.get("model") != model:
        return f"{received}: learned from {found.get('model')}, and this is {model}; must be of the same model"
    return None


def read(path: Path, model: str) -> Kept:
    """What a file keeps; nothing where there is none. Raises MacConfigError with what `fault` finds."""
    if reason := fault(path, model):
        raise MacConfigError(reason)
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        lessons = {name: Lessons(**said) for name, said in json.loads(file.metadata()["lessons"]).items()}
        part = lambda name, kind: file.get_tensor(f"{name}.{kind}")
        return {name: (Moments(*(part(name, x) for x in Moments.__slots__)), one) for name, one in lessons.items()}


def own(vllm_config: VllmConfig, location: str) -> Kept:
    """What the file of the worker keeps that this process runs. Raises MacConfigError as `read` does."""
    return read(own_path(vllm_config, location), model_of(vllm_config))


def remember(maps: Maps, moments: Moments, layer: str, location: str) -> None:
    """Make a layer's maps of what was kept. Raises MacConfigError where that cannot be."""
    shapes, needed = ([tuple(x.shape) for x in one.tensors()] for one in (moments, maps.moments))
    there = Moments(*(x.to(maps.to_key.device) for x in moments.tensors()))
    if shapes != needed or not learn([maps], [there], making=True)[0]:
        wrong = f"shapes {shapes}, not {needed}" if shapes != needed else "numbers that are not finite"
        raise MacConfigError(f"maps: received {location!r}: {layer} has {wrong}; must be of this model")


def write(path: Path, model: str, kept: Mapping[str, tuple[Moments, Lessons]]) -> None:
    """Keep this, in place of what was kept. Waits for the device. Raises OSError."""
    tensors = {
        f"{name}.{kind}": getattr(moments, kind).cpu().contiguous()
        for name, (moments, _) in kept.items()
        for kind in Moments.__slots__
    }
    lessons = {name: asdict(one) for name, (_, one) in kept.items()}
    part = path.with_name(f".{path.name}.{uuid4().hex}")  # servers of several machines may share a folder
    try:
        save_file(tensors, part, {"format": FORMAT, "model": model, "lessons": json.dumps(lessons)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)  # engines of other users may read it
        part.replace(path)  # whoever reads meanwhile has the one or the other
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        part.unlink(missing_ok=True)
