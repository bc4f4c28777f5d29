"""What a request may ask of MAC, and where that is checked.

A client sends it as `vllm_xargs` of an OpenAI request (`extra_body={"vllm_xargs": {...}}` with OpenAI's Python
client), a program as `SamplingParams(extra_args={...})`:

    {"mac": "on"}               what every request gets that asks for nothing
    {"mac": "off"}              the request is decoded exactly. With `rule: match` it holds no ring, and neither reads
                                nor writes one; with `rule: index` all its keys are read, and indexed for others.
                                Its heads are counted under the reason `request`.
    {"mac": "audit"}            the hits of all its decode steps are computed exactly too, and counted in the
                                histograms of errors, lags and chains, by which `error_budget` judges as well. For
                                servers that are started with `audit` above 0; others have no buffers for it.
                                Only `rule: match` has hits.
    {"mac_threshold": 0.95}     its matches need at least this threshold, a number from 0 to 1. A layer whose own
                                threshold is stricter keeps that. 1 reuses nothing, but still records. Only
                                `rule: match` has thresholds.

A key that looks like these (`mac_x`, `Mac`, `macthreshold`) is an error, as are other values: HTTP 400, or ValueError in
process. Both are found before the engine sees the request. Without MAC as attention backend vLLM ignores all of these, as
it ignores every unknown key.

What other requests left in the prefix cache is read as it is: KV of a reply that was decoded with reuse is not computed
anew for a request that is decoded exactly. The ring that a request takes over with such a prefix may have been recorded
under a looser threshold. vLLM itself drops `vllm_xargs` in beam search, and makes 1 and 0 of JSON's `true` and `false`
in them, so that `{"mac_threshold": true}` is a threshold of 1.
"""

import difflib
import functools
import inspect
import re
import reprlib
import sys
from collections.abc import Mapping
from typing import NamedTuple

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_mac.config import MacConfig, resolve
from vllm_mac.startup import chosen_by

MODE, THRESHOLD = KEYS = ("mac", "mac_threshold")
ON, OFF, AUDIT = MODES = ("on", "off", "audit")
ASYNC = "vllm.v1.engine.async_llm"


class Ask(NamedTuple):
    """What one request asked for.

    exact: to be decoded exactly. audited: that its hits are audited in every step. slack: the most that
    `(1 - threshold)^2` may be (`limits.limit`).
    """

    exact: bool = False
    audited: bool = False
    slack: float = 1.0


NOTHING = Ask()


class RequestError(VLLMValidationError, ValueError):
    """A request asks for what does not exist. The message lists every problem found."""


def read(extra_args: Mapping | None, config: MacConfig) -> Ask:
    """What a request asks for, of an engine with this configuration. Raises RequestError."""
    if not extra_args:
        return NOTHING
    problems = []
    for key in extra_args:
        if isinstance(key, str) and _looks_like_ours(key) and key not in KEYS:
            close = difflib.get_close_matches(key.lower(), KEYS, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            received = _show(extra_args[key])
            problems.append(f"{key}: unknown key, received {received}; {hint}must be one of {', '.join(KEYS)}")
    mode, threshold = extra_args.get(MODE, ON), extra_args.get(THRESHOLD, 0.0)
    index = config.rule == "index"
    modes = (ON, OFF) if index else MODES
    if mode == AUDIT and index:
        problems.append(
            f"{MODE}: received {AUDIT!r}, and an engine with rule: index has no hits to audit; choose from {ON!r}, {OFF!r}"
        )
    elif mode not in modes:
        problems.append(f"{MODE}: received {_show(mode)}; must be one of {', '.join(map(repr, modes))}")
    elif mode == AUDIT and not config.audit:
        problems.append(
            f"{MODE}: received {AUDIT!r}, for which there are no buffers, as the engine was started with audit at 0; "
            'start it with --additional-config \'{"mac": {"rule": "match", "audit": 0.01}}\' or another audit above 0, '
            f"or choose from {ON!r}, {OFF!r}"
        )
    # bool is an int to Python. NaN is in no range.
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if index and THRESHOLD in extra_args:
        problems.append(
            f"{THRESHOLD}: received {_show(threshold)}, and an engine with rule: index has no thresholds; leave it out, or "
            f"choose {MODE} from {ON!r}, {OFF!r}"
        )
    elif not number or not 0 <= threshold <= 1:
        problems.append(f"{THRESHOLD}: received {_show(threshold)}; must be a number from 0 to 1")
    if problems:
        raise RequestError("; ".join(problems), parameter="vllm_xargs")
    return Ask(mode == OFF, mode == AUDIT, (1.0 - threshold) ** 2)


def _looks_like_ours(key: str) -> bool:
    """`Mac`, `mac_x`, `mac-threshold`, `macthreshold`; not `machine_id`, which is another program's."""
    lower = key.lower()
    return bool(re.fullmatch(r"mac([-_. ].*)?", lower)) or bool(difflib.get_close_matches(lower, KEYS, 1, cutoff=0.8))


def _show(value: object) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def check_requests() -> None:
    """Have every front end of an engine with MAC check what requests ask for; once a process.

    vLLM has no place where a backend may check a request's parameters. So the object that checks them is wrapped where
    it is made, in the process that takes requests. The wrapping goes when vLLM lets backends check `extra_args`.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.__init__
    if hasattr(original, "checked_by_mac"):
        return

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if chosen_by(self.vllm_config.attention_config):
            _check_parameters(self)
            _check_before_streaming()

    __init__.checked_by_mac = True
    InputProcessor.__init__ = __init__


def _check_parameters(processor) -> None:
    config = resolve((processor.vllm_config.additional_config or {}).get("mac"))
    validate = processor._validate_params

    def check(params: object) -> None:
        if isinstance(params, SamplingParams):
            read(params.extra_args, config)

    @functools.wraps(validate)
    def _validate_params(params, *args, **kwargs):
        check(params)
        return validate(params, *args, **kwargs)

    processor.mac_check, processor._validate_params = check, _validate_params


def _check_before_streaming() -> None:
    """`AsyncLLM.generate` looks at nothing before its first output is asked for, when a streamed response has begun
    and its status has been sent. Its module is there if it is used at all: importing it takes 0.4 s.

    The wrapping goes when vLLM checks a request's parameters before it begins to answer.
    """
    module = sys.modules.get(ASYNC)
    if module is None or hasattr(module.AsyncLLM.generate, "checked_by_mac"):
        return
    original = module.AsyncLLM.generate
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self, *args, **kwargs):
        check = getattr(self.input_processor, "mac_check", None)
        if check is not None:
            check(signature.bind(self, *args, **kwargs).arguments["sampling_params"])
        return original(self, *args, **kwargs)

    generate.checked_by_mac = True
    module.AsyncLLM.generate = generate
