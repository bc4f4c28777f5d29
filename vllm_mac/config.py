"""The configuration: its keys, their checks, and where their values come from.

`resolve` is the one way in. It knows neither vLLM nor torch.
"""

import difflib
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from vllm_mac.config_files import MacConfigError, find, read, show

ENV_VAR = "MAC_ATTENTION_CONFIG"  # vLLM warns about unknown VLLM_* names
INLINE = "--additional-config mac"
FILE_KEY = "config"  # the inline key that names a YAML file

_RANGE = re.compile(r"(\d+)-(\d+)")
_PATTERN_RULE = (
    "a layer index such as 3, an inclusive range such as '0-3', or a glob on the "
    "layer's full name such as 'model.layers.*.self_attn.attn'"
)

Rule = Literal["index", "match"]
RULES: tuple[str, ...] = get_args(Rule)
RingDtype = Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"]
RING_DTYPES: tuple[str, ...] = get_args(RingDtype)


def _check_pattern(item: object) -> object:
    if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
        return item
    if isinstance(item, str):
        if span := _RANGE.fullmatch(item):
            if int(span[1]) <= int(span[2]):
                return item
        # A glob without a letter or a wildcard matches no layer name: it is a slip.
        elif re.search(r"[A-Za-z*?]", item):
            return item
    raise ValueError("not a layer pattern")


LayerPattern = Annotated[int | str, BeforeValidator(_check_pattern)]
# YAML and JSON have lists; a tuple keeps the configuration hashable.
LayerPatterns = Annotated[
    tuple[LayerPattern, ...],
    BeforeValidator(lambda items: tuple(items) if isinstance(items, list) else items),
]


def _number_keys(thresholds: object) -> object:
    """JSON has no integer keys: "3" is the layer index 3 where a pattern is a key."""
    if not isinstance(thresholds, dict):
        return thresholds
    number = lambda key: int(key) if isinstance(key, str) and key.isdecimal() else key
    named = {number(key): value for key, value in thresholds.items()}
    if len(named) < len(thresholds):
        raise ValueError("a layer index given twice")  # as 3 and as "3"
    return named


# Kept as pairs, which can be hashed and have an order.
LayerThresholds = Annotated[
    dict[LayerPattern, Annotated[float, Field(ge=0, le=1)]],
    BeforeValidator(_number_keys),
    AfterValidator(lambda thresholds: tuple(thresholds.items())),
    PlainSerializer(lambda pairs: {str(pattern): value for pattern, value in pairs}),
]


def _pattern_matches(pattern: int | str, name: str, index: int) -> bool:
    if isinstance(pattern, int):
        return pattern == index
    if span := _RANGE.fullmatch(pattern):
        return int(span[1]) <= index <= int(span[2])
    return fnmatchcase(name, pattern)


# From where reads saved pay for what it takes to save them, on an H200: `examples/results/lookup.md`.
MIN_CONTEXTS = {"index": 4096, "match": 2048}


class _Section(BaseModel):
    """Keys. A description that begins with a rule and a colon says that only this rule reads the key (`only_of`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LayerSelection(_Section):
    """Which attention layers MAC serves; the others run exact attention."""

    include: LayerPatterns | None = Field(None, description="Layers to serve: indices, ranges or globs; null for all.")
    exclude: LayerPatterns = Field((), description="Layers to leave exact, whatever `include` says.")
    threshold: LayerThresholds = Field(
        (),
        description="match: thresholds of layers by pattern, instead of the top-level one; of several "
        "patterns that match a layer the last counts.",
    )


class MacConfig(_Section):
    """The resolved configuration of one worker. Lengths and positions are in tokens."""

    enabled: bool = Field(True, description="Whether MAC runs at all; false is exact attention.")
    rule: Rule = Field(
        "index",
        description="How reads are saved: by an index of the keys that tells which of them matter (index), or by "
        "reusing what a query like this one read (match, the paper's).",
    )
    tolerance: float = Field(
        0.7,
        ge=0,
        description="index: a key is read where it gets this many times the attention of an average key, or more; "
        "0 reads all.",
    )
    index_size: int | None = Field(
        None,
        ge=32,
        multiple_of=16,
        description="index: directions that keys are indexed in, at most the head size; null for half the head size, "
        "48 at least.",
    )
    min_step_mib: int = Field(
        48,
        ge=0,
        description="index: least MiB of keys and values that a step's long rows have together, in a layer of one GPU. "
        "Smaller steps are read whole, which is faster; 0 looks up in every step. With speculation a third more for each "
        "token beside its own that any row verifies. CPUs do not read it.",
    )
    maps: str | None = Field(
        None,
        min_length=1,
        description="index: a file that keeps what maps of the index were learned from. It is read at the start if it is "
        "there, and written when maps are made; of several workers each has one, by its rank. null keeps nothing.",
    )
    window: int = Field(512, ge=1, le=65536, description="match: ring length, the last tokens a query can match.")
    band: int = Field(256, ge=1, description="The most recent tokens, always attended to exactly.")
    sink: int = Field(0, ge=0, description="The leading tokens, always attended to exactly; by index 16 at least.")
    threshold: float = Field(
        0.85,
        ge=0,
        le=1,
        description="match: hit when |q-q'|^2 < 2 d (1-threshold)^2; higher is stricter, 1 never hits.",
    )
    distance: Literal["absolute", "relative"] = Field(
        "absolute",
        description="match: what a query's distance is measured by: d, the squared norm of a standard "
        "normal query (absolute), or the query's own squared norm (relative).",
    )
    # Validated as a default too: the checks below need other fields.
    min_context: int = Field(
        "auto",
        ge=1,
        validate_default=True,
        description="Context length, the token being decoded included, from which reads are saved; auto is 4096 by index, "
        "2048 by match.",
    )
    lag_weight: float = Field(
        0.0,
        ge=0,
        description="match: among candidates under the threshold the lowest "
        "d^2/thr^2 + lag_weight*lag/window wins; 0 takes the nearest query.",
    )
    reuse: Literal["anchored", "chained"] = Field(
        "anchored",
        description="match: against the query that read the prefix (anchored) "
        "or against the one that last reused it (chained).",
    )
    max_chain: int | None = Field(
        None, ge=1, description="match: longest chain of hits built on one exact read; null for no cap."
    )
    mass_floor: float | None = Field(
        0.2,
        ge=1e-3,
        description="match: lets a match of little weight be farther off: the limit on |q-q'| is multiplied by "
        "(1+mass_floor)/(mass+mass_floor), mass being the share of the softmax that the reused part has beside "
        "band and sink. null: the limit is the same for all, as in the paper.",
    )
    ring_dtype: RingDtype = Field(
        "auto",
        description="match: what rings are stored in; auto is the model's dtype. With float8_e4m3fn only "
        "the queries are float8, and the outputs in the model's dtype.",
    )
    max_sequences: int | None = Field(
        None,
        ge=1,
        description="match: rings to allocate; null for as many as max_num_seqs, or as sequences of `min_context` tokens "
        "that a GPU's KV cache can hold, if they are less.",
    )
    ring_memory_gib: float | None = Field(
        None,
        gt=0,
        description="match: most GiB the rings of one worker may take, over all its layers; null for 5 % of the memory "
        "that vLLM may use on a GPU, 4 on CPUs.",
    )
    miss_engine: Literal["flashinfer", "triton"] = Field(
        "triton", description="match: what reads the prefix for missed heads on GPUs."
    )
    audit: float = Field(
        0.0, ge=0, le=1, description="match: share of decode steps whose hits are computed exactly too."
    )
    error_budget: float | None = Field(
        None,
        ge=1e-4,
        le=1,
        description="match: relative attention error; a layer whose audited p95 stays above it goes "
        "exact. null for no budget.",
    )
    layers: LayerSelection = Field(LayerSelection(), description="Which attention layers MAC serves.")

    @field_validator("min_context", mode="before")
    @classmethod
    def _least_that_pays(cls, min_context: object, info: ValidationInfo) -> object:
        most = max(MIN_CONTEXTS.values())  # where the rule is wrong by itself
        return MIN_CONTEXTS.get(info.data.get("rule"), most) if min_context == "auto" else min_context

    @field_validator("min_context", mode="after")
    @classmethod
    def _first_match_is_possible(cls, min_context: int, info: ValidationInfo) -> int:
        """At the first attempt m = min_context-1, and the newest entry is p = m-1.

        It can be matched when p+1-band > sink, hence band + sink < min_context - 1.
        """
        if not {"band", "sink"} <= info.data.keys():
            return min_context  # one of them is wrong by itself and reported so
        band, sink = info.data["band"], info.data["sink"]
        if band + sink < min_context - 1:
            return min_context
        raise PydanticCustomError(
            "fields_disagree",
            "band + sink must be less than min_context - 1, or no summary is left to match "
            "when matching begins: received {received}; set min_context to {least} or more",
            {
                "received": f"band={band}, sink={sink}, min_context={min_context}",
                "least": band + sink + 2,
                "fields": ("band", "sink", "min_context"),
            },
        )

    @field_validator("error_budget", mode="after")
    @classmethod
    def _errors_are_audited(cls, budget: float | None, info: ValidationInfo) -> float | None:
        if budget is None or info.data.get("audit") != 0:  # absent: wrong by itself and reported so
            return budget
        raise PydanticCustomError(
            "fields_disagree",
            "a budget needs audits to be judged by: received {received}; set audit to a share of "
            "decode steps above 0, such as 0.01, or error_budget to null",
            {"received": f"error_budget={budget}, audit=0.0", "fields": ("audit", "error_budget")},
        )

    def covers(self, layer_name: str, layer_index: int) -> bool:
        """Whether `layers` selects the layer of this full name and 0-based index."""

        def listed(patterns: tuple[int | str, ...]) -> bool:
            return any(_pattern_matches(p, layer_name, layer_index) for p in patterns)

        include = self.layers.include
        return (include is None or listed(include)) and not listed(self.layers.exclude)

    def for_layer(self, layer_name: str, layer_index: int) -> "MacConfig":
        """The configuration of one layer: with the threshold that `layers.threshold` gives it."""
        threshold = self.threshold
        for pattern, value in self.layers.threshold:
            if _pattern_matches(pattern, layer_name, layer_index):
                threshold = value
        return self if threshold == self.threshold else self.model_copy(update={"threshold": threshold})

    def idle_patterns(self, key: str, layers: Sequence[tuple[str, int]]) -> list[int | str]:
        """Patterns of `layers.KEY` (include, exclude or threshold) that match none of these (name, index)."""
        patterns = dict(self.layers.threshold) if key == "threshold" else getattr(self.layers, key) or ()
        return [p for p in patterns if not any(_pattern_matches(p, *layer) for layer in layers)]

    def describe(self) -> str:
        """One line for the log: every key that the rule reads with its value, `layers` by its dotted keys."""
        return " ".join(
            f"{'.'.join(at)}={value if isinstance(value, str) else json.dumps(value)}"
            for at, value in _leaves(self.model_dump(mode="json"))
            if only_of(at) in (None, self.rule)
        )


def only_of(at: Sequence[str]) -> str | None:
    """The rule that alone reads a key, or None. at: the key's name, below `layers` after that."""
    section = MacConfig if len(at) == 1 else LayerSelection
    rule = (section.model_fields[at[-1]].description or "").partition(":")[0]
    return rule if rule in RULES else None


def _leaves(keys: Mapping) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yields the place (as `only_of` takes it) and the value of each known key that is given."""
    for key, value in keys.items():
        if key == "layers" and isinstance(value, Mapping):
            yield from ((("layers", own), value[own]) for own in LayerSelection.model_fields if own in value)
        elif key in MacConfig.model_fields:
            yield (key,), value


def resolve(inline: object = None, environ: Mapping[str, str] = os.environ) -> MacConfig:
    """The configuration from defaults, overridden by a file, overridden by inline keys.

    Args:
        inline: `vllm_config.additional_config.get("mac")`: a mapping, or None for no keys.
            Its key `config` names a YAML file or a bundled configuration. `layers`
            replaces the file's value as a whole.
        environ: where `MAC_ATTENTION_CONFIG` names the file if `config` does not.

    Raises:
        MacConfigError: with every problem found in the keys, each with its field, the
            value received, the valid ones and its source.
    """
    inline_keys = _as_mapping(inline, INLINE)
    location, named_by = inline_keys.pop(FILE_KEY, None), f"{INLINE}.{FILE_KEY}"
    if location is None:
        location, named_by = environ.get(ENV_VAR) or None, ENV_VAR
    fields = tuple(MacConfig.model_fields)
    stages = [(inline_keys, INLINE, (*fields, FILE_KEY))]
    if location is not None:
        path = find(location, named_by)
        source = f"{path} (named by {named_by})"
        stages.insert(0, (_as_mapping(read(path, source), source), source, fields))

    problems: list[str] = []
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    complete = {source for keys, source, _ in stages if keys.keys() >= {*fields}}
    for keys, source, known in stages:
        for key, value in keys.items():
            if key in fields:
                values[key], sources[key] = value, source
            else:
                problems.append(_unknown_key(str(key), value, source, known))
    unread = _unread(values, sources, complete)
    problems += unread.values()
    try:
        config = MacConfig.model_validate(values)
    except ValidationError as invalid:
        # What is not read need not be right.
        errors = (error for error in invalid.errors() if not {error["loc"][:1], error["loc"][:2]} & unread.keys())
        problems += [_problem(error, sources) for error in errors]
    if problems:
        raise MacConfigError("invalid MAC configuration:\n  " + "\n  ".join(problems))
    return config


def _unread(values: Mapping, sources: Mapping[str, str], complete: Container[str]) -> dict[tuple[str, ...], str]:
    """Keys that are given though only the other rule reads them, by their place, with what to say of each.

    complete: sources that give every key, as `configs/default.yaml` does; what is the default there asks for nothing.
    """
    rule = values.get("rule", MacConfig.model_fields["rule"].default)
    if rule not in RULES:
        return {}
    defaults, found = dict(_leaves(MacConfig().model_dump(mode="json"))), {}
    chosen = f"rule is {rule} from {sources['rule']}" if "rule" in sources else f"rule is {rule}, the default"
    for at, value in _leaves(values):
        other, source = only_of(at), sources[at[0]]
        if other not in (None, rule) and not (source in complete and value == defaults[at]):
            found[at] = (
                f"{'.'.join(at)}: received {show(value)} from {source}, which only rule: {other} reads, and {chosen}; "
                f"leave it out, or set rule to {other}"
            )
    return found


def _as_mapping(value: object, source: str) -> dict:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    raise MacConfigError(
        f"{source}: received {show(value)}; must be a mapping with keys from {', '.join(MacConfig.model_fields)}"
    )


def _unknown_key(name: str, value: object, source: str, known: Iterable[str]) -> str:
    leaf = name.rpartition(".")[2]
    nearest = difflib.get_close_matches(leaf.lower(), known, n=1, cutoff=0.6)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"{name}: unknown key, received {show(value)} from {source}{hint} Known keys: {', '.join(known)}"


def _problem(error: ErrorDetails, sources: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors, in the terms of the configuration."""
    loc = error["loc"]
    name, value = ".".join(str(part) for part in loc if part != "[key]"), error["input"]
    source = sources.get(str(loc[0]), "the defaults")
    if error["type"] == "fields_disagree":
        origins = (f"{key} from {sources.get(key, 'the defaults')}" for key in error["ctx"]["fields"])
        return f"{name}: {error['msg']} ({', '.join(origins)})"
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown_key(name, value, source, tuple(LayerSelection.model_fields))
    return f"{name}: received {show(value)} from {source}; must be {_valid(loc)}"


def _valid(loc: tuple[int | str, ...]) -> str:
    """What the field at `loc` takes, in words."""
    if loc[0] != "layers":
        return _in_words(MacConfig.model_json_schema()["properties"][loc[0]])
    if len(loc) == 1:
        return f"a mapping with keys from {', '.join(LayerSelection.model_fields)}"
    threshold = _in_words(MacConfig.model_json_schema()["properties"]["threshold"])
    if loc[1] == "threshold" and loc[-1] != "[key]":
        if len(loc) > 2:
            return threshold
        return f"a mapping to {threshold}, each key, given once, {_PATTERN_RULE}"
    if len(loc) == 2:
        return f"a list, each item {_PATTERN_RULE}" + (", or null" if loc[1] == "include" else "")
    return _PATTERN_RULE


def _in_words(schema: dict) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    words = {
        "boolean": "true or false", "integer": "an integer", "number": "a finite number", "string": "the path of a file",
    }  # fmt: skip
    text = words.get(schema["type"], schema["type"])
    if "maximum" in schema:
        return f"{text} from {schema['minimum']} to {schema['maximum']}"
    if "minimum" in schema:
        steps = f" in steps of {schema['multipleOf']}" if "multipleOf" in schema else ""
        return f"{text} of at least {schema['minimum']}{steps}"
    if "exclusiveMinimum" in schema:
        return f"{text} greater than {schema['exclusiveMinimum']}"
    return text
