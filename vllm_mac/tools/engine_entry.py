"""What the engine processes of the commands share: `python -m MODULE SPEC FD`, the other end of `engine_process`.

SPEC names a JSON file. The process writes its stages and results as JSON lines to the file descriptor FD.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_mac.tools import ToolError


def serve(main: Callable) -> None:
    """Run `main(spec, send)` as the command line describes, then end the process. A ToolError is sent as `error`."""
    channel = int(sys.argv[2])
    send = lambda **message: os.write(channel, (json.dumps(message) + "\n").encode())
    try:
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), send)
    except ToolError as error:
        send(error=str(error))
        send(done=True)
    os._exit(0)


def read_counters(llm) -> dict[tuple, int]:
    """MAC's counters by (name, labels), summed over all workers."""
    total: dict[tuple, int] = {}
    for samples in llm.collective_rpc("mac_counters"):
        for name, labels, value in samples:
            key = name, tuple(sorted(labels.items()))
            total[key] = total.get(key, 0) + value
    return total
