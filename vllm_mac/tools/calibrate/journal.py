"""What `vllm-mac calibrate --metric kl --keep FILE` has measured so far, so that a stopped run goes on where it was.

JSON lines: what the figures depend on; the replies; then a line for each pass over half of the texts.
"""

import fcntl
import json
from pathlib import Path

from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.runs import differences


class Journal:
    """Replies and passes of one file, which no other process may use meanwhile; without a file nothing is kept.

    A pass is told by a value that JSON can hold. Each is in the file as soon as it is put. about: what the
    figures depend on. Raises CalibrateError for a file of another run, in use or unreadable, and for one that is no
    journal; such files are left as they are.
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
            self._read(path, _flat(json.loads(json.dumps(about))))

    def _read(self, path: Path, about: dict) -> None:
        self._file.seek(0)
        content = self._file.read()
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
        if there not in (None, about):
            differ = "; ".join(differences(there, about))
            raise CalibrateError(f"--keep: {path} holds another run's measurements; choose another file. {differ}")
        self._file.truncate(len(whole))  # a stop may have cut the last line short
        if there is None:
            self._write({"about": about})

    def __len__(self) -> int:
        return len(self._passes)

    def keep_replies(self, replies: list[list[int]]) -> None:
        self.replies = replies
        self._write({"replies": replies})

    def found(self, told):
        """What `put` was given for this pass, as JSON has it, or None."""
        return self._passes.get(_key(told))

    def put(self, told, found) -> None:
        self._passes[_key(told)] = found
        self._write({"pass": told, "found": found})

    def _write(self, line: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()


def _key(told) -> str:
    return json.dumps(told, sort_keys=True)


def _flat(tree: dict, above: str = "") -> dict:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`, so that differences are told key by key."""
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return found
