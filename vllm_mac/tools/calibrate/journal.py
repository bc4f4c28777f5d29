"""The file of `vllm-mac calibrate --metric kl --keep FILE`, from which a stopped run continues.

Its JSON lines are: everything that the results depend on; the replies; a line for each pass over half of the texts.
"""

import fcntl
import json
from pathlib import Path
from typing import BinaryIO

from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.resume import differences


class Journal:
    """Replies and passes in one file, locked against other processes. Without a file nothing is kept.

    A pass is identified by a value that JSON can hold. `put` writes it to the file immediately. about: everything that
    the results depend on. Raises CalibrateError for a file that belongs to another run, is in use, is unreadable or is
    not a journal; such a file is not changed.
    """

    def __init__(self, path: Path | None, about: dict):
        self.replies: list[list[int]] | None = None
        self._passes: dict[str, object] = {}
        self._file = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "ab+")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CalibrateError(f"--keep: {path} is in use by another run; choose another file") from None
            except OSError as error:
                raise CalibrateError(f"--keep: {path}: {error.strerror}") from error
            self._read(self._file, path, _flat(json.loads(json.dumps(about))))

    def _read(self, file: BinaryIO, path: Path, about: dict) -> None:
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            there = dict(lines.pop(0)["about"]) if lines else None
            for line in lines:
                if "replies" in line:
                    self.replies = line["replies"]
                else:
                    self._passes[_key(line["pass"])] = line["found"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrateError(
                f"--keep: {path} holds no measurements of --metric kl ({type(error).__name__}: {error})"
            ) from error
        if there is None and content and not content.startswith(b'{"about"'):
            raise CalibrateError(f"--keep: {path} holds no measurements of --metric kl")
        if there is not None and there != about:
            differ = "; ".join(differences(there, about))
            raise CalibrateError(f"--keep: {path} holds another run's measurements; choose another file. {differ}")
        file.truncate(len(whole))  # a stop may have left an incomplete line
        if there is None:
            self._write({"about": about})

    def __len__(self) -> int:
        return len(self._passes)

    def keep_replies(self, replies: list[list[int]]) -> None:
        self.replies = replies
        self._write({"replies": replies})

    def found(self, key):
        """The result of a pass that `put` stored, as plain data from JSON; None for an unknown pass."""
        return self._passes.get(_key(key))

    def put(self, key, found) -> None:
        self._passes[_key(key)] = found
        self._write({"pass": key, "found": found})

    def _write(self, line: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()


def _key(key) -> str:
    return json.dumps(key, sort_keys=True)


def _flat(tree: dict, above: str = "") -> dict:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`, so that an error can name the keys that differ."""
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return found
