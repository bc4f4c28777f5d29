"""The configuration: what it accepts, what it refuses, and what its errors say."""

import pickle
import re

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from support.configs import DEFAULTS, chosen, keys_of, refusal
from vllm_mac.config import (
    INLINE,
    LayerSelection,
    MacConfig,
    MacConfigError,
    resolve,
)

# Defaults and types


def test_no_keys_give_the_defaults():
    assert keys_of(resolve(None, {})) == DEFAULTS
    assert keys_of(resolve({}, {})) == DEFAULTS
    assert resolve({}, {}) == MacConfig()


def test_every_field_is_described():
    for model in (MacConfig, LayerSelection):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_is_frozen_hashable_and_survives_a_process_boundary():
    config = resolve({"rule": "match", "layers": {"include": [1, "2-3"], "threshold": {"2-3": 0.5}}}, {})
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.window = 1
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.layers.include = None
    assert config.layers.include == (1, "2-3")
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert hash(copy) == hash(config)


INTEGERS = ["window", "band", "sink", "min_context", "max_chain", "max_sequences", "index_size", "min_step_mib"]
FLOATS = ["threshold", "lag_weight", "ring_memory_gib", "audit", "tolerance"]


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", ["512", 512.5, 512.0, True, [512], {"a": 1}])
def test_an_integer_takes_nothing_else(field, value):
    message = refusal(chosen(field) | {field: value})
    assert f"{field}: received {value!r} ({type(value).__name__}) from {INLINE}" in message
    assert "must be an integer" in message


@pytest.mark.parametrize("field", FLOATS)
def test_a_float_takes_an_integer(field):
    value = getattr(resolve(chosen(field) | {field: 1}, {}), field)
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", ["0.5", True, float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_float_takes_no_text_no_truth_value_and_nothing_infinite(field, value):
    assert f"{field}: received" in refusal(chosen(field) | {field: value})


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_a_truth_value_takes_nothing_else(value):
    assert f"enabled: received {value!r}" in refusal({"enabled": value})
    assert "must be true or false" in refusal({"enabled": value})


@pytest.mark.parametrize(
    "field",
    [
        "rule",
        "window",
        "band",
        "sink",
        "distance",
        "min_context",
        "reuse",
        "ring_dtype",
        "layers",
        "tolerance",
        "min_step_mib",
        "threshold",
        "lag_weight",
        "audit",
    ],
)
def test_null_only_where_it_has_a_meaning(field):
    assert f"{field}: received None (NoneType)" in refusal(chosen(field) | {field: None})


# Ranges

BOUNDS = [
    ("rule", ["match", "index"], ["Index", "both", 1], "one of index, match"),
    ("tolerance", [0, 1.5, 40], [-0.1], "a finite number of at least 0"),
    ("index_size", [None, 32, 64, 256], [0, 16, 40], "an integer of at least 32 in steps of 16 or null"),
    ("min_step_mib", [0, 48, 4096], [-1], "an integer of at least 0"),
    ("maps", [None, "maps.safetensors"], ["", 5], "the path of a file or null"),
    ("window", [1, 65536], [0, -1, 65537], "an integer from 1 to 65536"),
    ("band", [1, 2046], [0, -256], "an integer of at least 1"),
    ("sink", [0, 1790], [-1], "an integer of at least 0"),
    ("threshold", [0, 0.45, 1, 1.0], [-0.01, 1.01], "a finite number from 0 to 1"),
    ("min_context", [258, 10**6], [0, -1], "an integer of at least 1"),
    ("lag_weight", [0, 4.5], [-0.1], "a finite number of at least 0"),
    ("miss_engine", ["flashinfer", "triton"], ["flash", 1], "one of flashinfer, triton"),
    ("reuse", ["anchored", "chained"], ["nearest", "Anchored", 1], "one of anchored, chained"),
    ("distance", ["absolute", "relative"], ["cosine", 0], "one of absolute, relative"),
    ("mass_floor", [None, 0.001, 3], [0, 0.0009, -0.1, "0.2"], "a finite number of at least 0.001 or null"),
    ("max_chain", [None, 1, 99], [0, -1], "an integer of at least 1 or null"),
    (
        "ring_dtype",
        ["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"],
        ["fp8", "bf16", "float8_e5m2"],
        "one of auto, float32, bfloat16, float16, float8_e4m3fn",
    ),
    ("max_sequences", [None, 1, 512], [0], "an integer of at least 1 or null"),
    ("ring_memory_gib", [None, 0.001, 80], [0, -1.0], "a finite number greater than 0 or null"),
    ("audit", [0, 0.01, 1], [-0.1, 1.5], "a finite number from 0 to 1"),
    ("error_budget", [None], [0, 1.1, "0.1"], "a finite number from 0.0001 to 1 or null"),
]


@pytest.mark.parametrize(("field", "good", "bad", "valid"), BOUNDS)
def test_range(field, good, bad, valid):
    for value in good:
        assert getattr(resolve(chosen(field) | {field: value}, {}), field) == value
    for value in bad:
        message = refusal(chosen(field) | {field: value})
        assert f"{field}: received {value!r} " in message
        assert message.endswith(f"from {INLINE}; must be {valid}")


def matchable(band: int, sink: int, min_context: int, window: int) -> bool:
    """The match rule by enumeration: is any entry eligible at the first attempt?"""
    m = min_context - 1
    return any(p + 1 - band > sink for p in range(max(0, m - window), m))


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 80), st.integers(1, 40))
def test_band_and_sink_leave_a_summary_to_match(band, sink, min_context, window):
    keys = {"rule": "match", "band": band, "sink": sink, "min_context": min_context, "window": window}
    if matchable(band, sink, min_context, window):
        assert resolve(keys, {}).band == band
        return
    message = refusal(keys)
    assert f"band={band}, sink={sink}, min_context={min_context}" in message
    least = int(re.search(r"set min_context to (\d+) or more", message)[1])
    assert resolve(keys | {"min_context": least}, {}).min_context == least
    assert not matchable(band, sink, least - 1, window)


def test_disagreeing_fields_name_the_origin_of_each(yaml_file):
    path = yaml_file("sink: 4\n")
    message = refusal({"config": path, "band": 4091})
    assert "band + sink must be less than min_context - 1" in message
    assert "received band=4091, sink=4, min_context=4096" in message
    assert f"band from {INLINE}, sink from {path} (named by {INLINE}.config)" in message
    assert "min_context from the defaults" in message
    assert resolve({"config": path, "band": 4090}, {}).band == 4090


# The rule that reads a key

OF_INDEX = {"tolerance": 2.0, "index_size": 64, "maps": "maps.safetensors", "min_step_mib": 0}
OF_MATCH = {
    "window": 64, "threshold": 0.9, "distance": "relative", "lag_weight": 1.0, "reuse": "chained", "max_chain": 3,
    "mass_floor": None, "ring_dtype": "float32", "max_sequences": 2, "ring_memory_gib": 1.0, "miss_engine": "flashinfer",
    "audit": 0.01, "error_budget": 0.1, "layers": {"threshold": {3: 0.5}},
}  # fmt: skip
GIVEN = [("match", "index", key, value) for key, value in OF_MATCH.items()]
GIVEN += [("index", "match", key, value) for key, value in OF_INDEX.items()]


@pytest.mark.parametrize(("other", "rule", "key", "value"), GIVEN)
def test_a_key_that_the_rule_does_not_read_is_refused(other, rule, key, value, yaml_file):
    name, shown = ("layers.threshold", {3: 0.5}) if key == "layers" else (key, value)
    what = f"  {name}: received {shown!r} ({type(shown).__name__}) from "
    why = f"which only rule: {other} reads, and rule is {rule} from {INLINE}; leave it out, or set rule to {other}"
    assert refusal({"rule": rule, key: value}) == f"invalid MAC configuration:\n{what}{INLINE}, {why}"
    path = yaml_file(yaml.safe_dump({key: value}))
    assert refusal({"rule": rule, "config": path}).endswith(f"{what}{path} (named by {INLINE}.config), {why}")
    if rule == "index":  # which it is by default too
        assert refusal({key: value}).endswith(why.replace(f"index from {INLINE}", "index, the default"))
    # What it has by default it may not have either, where it was written by itself.
    if key != "layers":
        assert f"{key}: received {DEFAULTS[key]!r} " in refusal({"rule": rule, key: DEFAULTS[key]})


@pytest.mark.parametrize("rule", ["match", "index"])
def test_every_other_key_is_read_by_both_rules(rule):
    keys = {key: value for key, value in DEFAULTS.items() if key not in OF_MATCH.keys() | OF_INDEX.keys()}
    assert keys.keys() == {"enabled", "rule", "band", "sink", "min_context"}
    layers = {"include": ["0-3"], "exclude": [2]}
    assert resolve(keys | {"rule": rule, "band": 64, "layers": layers}, {}).layers.exclude == (2,)


@pytest.mark.parametrize("rule", ["match", "index"])
def test_a_source_of_every_key_may_hold_the_other_rule_s_defaults(rule, yaml_file):
    """A copy of `configs/default.yaml` is one."""
    whole = DEFAULTS | {"rule": rule}
    path = yaml_file(yaml.safe_dump(whole))
    assert resolve(whole, {}) == resolve({"config": path}, {}) == resolve({"rule": rule}, {})
    other = {"match": "tolerance", "index": "window"}[rule]
    assert f"{other}: received 7 (int) from {INLINE}, which only rule" in refusal(whole | {other: 7})
    assert f"{other}: received {DEFAULTS[other]!r} " in refusal({"config": path, other: DEFAULTS[other]})
    del whole["enabled"]
    assert len(refusal(whole).splitlines()) == 1 + (len(OF_INDEX) if rule == "match" else len(OF_MATCH))


def test_the_rule_of_a_file_yields_to_an_inline_one_and_its_keys_do_not(yaml_file):
    path = yaml_file("rule: match\nwindow: 64\n")
    assert resolve({"config": path}, {}).window == 64
    message = refusal({"config": path, "rule": "index"})
    assert f"window: received 64 (int) from {path} (named by {INLINE}.config), which only rule: match reads" in message


def test_a_key_that_is_not_read_is_wrong_once():
    """Neither its value nor what it would need is judged; nor is it, where the rule itself is wrong."""
    assert len(refusal({"threshold": 7, "error_budget": 0.1, "layers": {"threshold": 3}}).splitlines()) == 4
    assert refusal({"rule": "both", "window": 64}).splitlines()[1:] == [
        f"  rule: received 'both' (str) from {INLINE}; must be one of index, match"
    ]


def test_an_error_budget_needs_audits(yaml_file):
    message = refusal({"rule": "match", "error_budget": 0.1})
    assert "error_budget: a budget needs audits to be judged by: received error_budget=0.1, audit=0.0" in message
    assert f"audit from the defaults, error_budget from {INLINE}" in message
    path = yaml_file("rule: match\nerror_budget: 0.1\n")
    assert resolve({"config": path, "audit": 0.01}, {}).error_budget == 0.1
    wrong = refusal({"rule": "match", "audit": 2, "error_budget": 0.1})
    assert "audit: received 2" in wrong and "needs audits" not in wrong


# Layers

NAME = "model.layers.{}.self_attn.attn"


@pytest.mark.parametrize(
    ("layers", "covered"),
    [
        ({}, range(8)),
        ({"include": None}, range(8)),
        ({"include": []}, []),
        ({"include": [0, 7]}, [0, 7]),
        ({"include": ["2-4"]}, [2, 3, 4]),
        ({"include": ["3-3", 5]}, [3, 5]),
        ({"include": ["model.layers.[12].*"]}, [1, 2]),
        ({"include": ["MODEL.*"]}, []),
        ({"exclude": [0]}, range(1, 8)),
        ({"include": ["0-5"], "exclude": ["*.layers.3.*", "5-9"]}, [0, 1, 2, 4]),
        ({"exclude": ["*"]}, []),
    ],
)
def test_covers(layers, covered):
    config = resolve({"layers": layers}, {})
    assert [i for i in range(8) if config.covers(NAME.format(i), i)] == list(covered)


def test_covers_takes_the_index_from_the_caller_not_from_the_name():
    config = resolve({"layers": {"include": [1]}}, {})
    assert config.covers("encoder.attn", 1)
    assert not config.covers("model.layers.1.attn", 2)


@pytest.mark.parametrize("list_name", ["include", "exclude"])
@pytest.mark.parametrize("item", [-1, True, 1.0, None, "", "3", "-1", "3-1", "0:3", "0-", ["0-3"]])
def test_a_pattern_that_can_match_nothing_is_refused(list_name, item):
    message = refusal({"layers": {list_name: [0, item]}})
    assert f"layers.{list_name}.1: received {item!r}" in message
    assert "an inclusive range such as '0-3'" in message


@pytest.mark.parametrize("value", [3, "0-3", {"a": 1}])
def test_patterns_come_as_a_list(value):
    message = refusal({"layers": {"include": value}})
    assert f"layers.include: received {value!r}" in message
    assert "must be a list" in message


def test_layers_is_a_mapping_with_known_keys():
    assert "layers: received [1] (list)" in refusal({"layers": [1]})
    keys = "include, exclude, threshold"
    assert f"must be a mapping with keys from {keys}" in refusal({"layers": [1]})
    message = refusal({"layers": {"inculde": [1], 3: 4}})
    assert "layers.inculde: unknown key, received [1] (list)" in message
    assert f"did you mean 'include'? Known keys: {keys}" in message
    assert "layers.3: unknown key" in message


@pytest.mark.parametrize(
    ("thresholds", "found"),
    [
        ({}, [0.85] * 6),
        ({2: 0.5, "4": 1}, [0.85, 0.85, 0.5, 0.85, 1, 0.85]),
        ({"1-2": 0.6, "*.layers.5.*": 0}, [0.85, 0.6, 0.6, 0.85, 0.85, 0]),
        # The last that matches counts: the exception below its rule.
        ({"*": 0.7, "1-3": 0.6, 2: 0.5}, [0.7, 0.6, 0.5, 0.6, 0.7, 0.7]),
        ({2: 0.5, "1-3": 0.6, "*": 0.7}, [0.7] * 6),
    ],
)
def test_thresholds_of_layers(thresholds, found, yaml_file):
    keys = {"rule": "match", "window": 64, "layers": {"exclude": [0], "threshold": thresholds}}
    path = yaml_file(yaml.safe_dump(keys, sort_keys=False))
    for config in (resolve(keys, {}), resolve({"config": path}, {})):
        own = [config.for_layer(NAME.format(i), i) for i in range(6)]
        assert [one.threshold for one in own] == found
        # Nothing but the threshold is the layer's own.
        assert {one.model_copy(update={"threshold": 0.85}) for one in own} == {config}


def test_patterns_that_match_no_layer_are_known():
    thresholds = {"*": 0.5, "2-3": 0.6, 7: 0.5, "*.mlp": 0.5, "8-9": 0.5}
    patterns = {"include": ["0-3", 8], "exclude": ["*.mlp", "*.1.*"], "threshold": thresholds}
    config = resolve({"rule": "match", "layers": patterns}, {})
    layers = [(NAME.format(i), i) for i in range(8)]
    assert config.idle_patterns("threshold", layers) == ["*.mlp", "8-9"]
    assert config.idle_patterns("include", layers) == [8]
    assert config.idle_patterns("exclude", layers) == ["*.mlp"]
    assert resolve({}, {}).idle_patterns("include", layers) == []


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", None, True, float("nan"), [0.5]])
def test_a_threshold_of_a_layer_is_checked_like_the_top_level_one(value):
    message = refusal({"rule": "match", "layers": {"threshold": {3: 0.5, "0-3": value}}})
    assert f"layers.threshold.0-3: received {value!r} ({type(value).__name__}) from" in message
    assert message.endswith("; must be a finite number from 0 to 1")


@pytest.mark.parametrize("key", [-1, True, 1.0, None, "", "-1", "3-1", "0:3", "0-", (0, 3)])
def test_a_threshold_is_of_a_layer_pattern(key):
    message = refusal({"rule": "match", "layers": {"threshold": {key: 0.5}}})
    assert "  layers.threshold." in message and f": received {key!r} " in message
    assert "[key]" not in message  # pydantic's name for where it went wrong
    assert message.endswith("'model.layers.*.self_attn.attn'")


@pytest.mark.parametrize("value", [0.5, [0.5], None, {3: 0.5, "3": 0.6}])
def test_thresholds_of_layers_come_as_a_mapping_that_names_each_once(value):
    message = refusal({"rule": "match", "layers": {"threshold": value}})
    assert f"layers.threshold: received {value!r}" in message
    assert "must be a mapping to a finite number from 0 to 1, each key, given once, a layer" in message


# Unknown keys, and several errors at once


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("bnad", "band"), ("Window", "window"), ("ring_memory_gb", "ring_memory_gib")],
)
def test_an_unknown_key_names_the_nearest_and_all_known(key, nearest):
    message = refusal({key: 7})
    assert f"{key}: unknown key, received 7 (int) from {INLINE}" in message
    assert f"did you mean {nearest!r}?" in message
    assert f"Known keys: {', '.join([*DEFAULTS, 'config'])}" in message


def test_an_unknown_key_like_no_other_has_no_suggestion():
    message = refusal({"zzz": 7})
    assert "did you mean" not in message
    assert "Known keys: enabled, rule" in message


def test_keys_that_are_not_text_are_unknown():
    assert "1: unknown key, received 2 (int)" in refusal({1: 2})


def test_all_errors_are_reported_at_once(yaml_file):
    path = yaml_file("rule: match\nwindw: 1\nthreshold: 2\nconfig: other.yaml\n")
    message = refusal({"config": path, "reuse": "x", "bnad": 1, "band": 5000, "layers": {"a": 1}})
    lines = message.splitlines()
    assert lines[0] == "invalid MAC configuration:"
    fields = sorted(line.strip().split(":")[0] for line in lines[1:])
    assert fields == sorted(["windw", "threshold", "config", "reuse", "bnad", "min_context", "layers.a"])
    origin = {line.strip().split(":")[0]: path in line for line in lines[1:]}
    assert origin["windw"] and origin["threshold"] and origin["config"]
    assert not (origin["reuse"] or origin["bnad"] or origin["layers.a"])


@pytest.mark.parametrize("value", [[1], "default", 3, True])
def test_inline_keys_come_as_a_mapping(value):
    message = refusal(value)
    assert f"{INLINE}: received {value!r} ({type(value).__name__})" in message
    assert "must be a mapping with keys from enabled, rule" in message


# The round trip

PATTERNS = st.lists(
    st.integers(0, 200)
    | st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda t: f"{min(t)}-{max(t)}")
    | st.text(min_size=1, max_size=12).map(lambda text: f"*{text}"),
    max_size=4,
)
FINITE = {"allow_nan": False, "allow_infinity": False}
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "tolerance": st.floats(0, **FINITE) | st.integers(0, 9),
        "index_size": st.none() | st.integers(2, 16).map(lambda n: 16 * n),
        "maps": st.none() | st.text(min_size=1),
        "min_step_mib": st.integers(0, 10**6),
        "window": st.integers(1, 65536),
        "band": st.integers(1, 900),
        "sink": st.integers(0, 900),
        "threshold": st.floats(0, 1) | st.integers(0, 1),
        "min_context": st.integers(2000, 10**9),
        "lag_weight": st.floats(0, **FINITE) | st.integers(0, 9),
        "reuse": st.sampled_from(["anchored", "chained"]),
        "max_chain": st.none() | st.integers(1, 10**6),
        "mass_floor": st.none() | st.floats(1e-3, 1e3),
        "distance": st.sampled_from(["absolute", "relative"]),
        "ring_dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"]),
        "miss_engine": st.sampled_from(["flashinfer", "triton"]),
        "max_sequences": st.none() | st.integers(1, 4096),
        "ring_memory_gib": st.none() | st.floats(0, exclude_min=True, **FINITE) | st.integers(1, 80),
        "layers": st.fixed_dictionaries(
            {},
            optional={
                "include": st.none() | PATTERNS,
                "exclude": PATTERNS,
                "threshold": PATTERNS.flatmap(
                    lambda patterns: st.fixed_dictionaries(dict.fromkeys(patterns, st.floats(0, 1)))
                ),
            },
        ),
    },
)


@given(CONFIGS, st.sampled_from(["match", "index"]))
@settings(max_examples=150, deadline=None)
def test_round_trip(tmp_path_factory, keys, rule):
    others = OF_INDEX if rule == "match" else OF_MATCH
    read = {key: value for key, value in keys.items() if key not in others or key == "layers"}
    if rule == "index" and "layers" in read:
        read["layers"] = {key: value for key, value in read["layers"].items() if key != "threshold"}
    config = resolve(read | {"rule": rule}, {})
    path = tmp_path_factory.mktemp("round") / "mac.yaml"
    path.write_text(yaml.safe_dump(keys_of(config), sort_keys=False), encoding="utf-8")
    assert resolve({"config": str(path)}, {}) == config
    assert resolve(keys_of(config), {}) == config


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES | st.dictionaries(st.sampled_from(list(DEFAULTS)) | st.text(max_size=8), VALUES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_whatever_comes_is_accepted_in_full_or_refused_by_the_one_exception(inline):
    try:
        config = resolve(inline, {})
    except MacConfigError as error:
        assert str(error)
    else:
        given_keys = {} if inline is None else inline
        assert {key: getattr(config, key) for key in given_keys if key != "layers"} == {
            key: value for key, value in given_keys.items() if key not in ("layers", "config")
        }


# The log line


def test_describe_is_one_line_with_every_key_that_the_rule_reads():
    layers = {"include": ["0-3", 5], "threshold": {5: 0.5, "0-3": 1}}
    line = resolve({"rule": "match", "max_chain": 3, "layers": layers}, {}).describe()
    assert "\n" not in line
    assert line.startswith("enabled=true rule=match window=512 band=256 ")
    assert "reuse=anchored max_chain=3 mass_floor=0.2 ring_dtype=auto max_sequences=null" in line
    assert line.endswith('layers.include=["0-3", 5] layers.exclude=[] layers.threshold={"5": 0.5, "0-3": 1.0}')
    assert all((f" {key}=" in line) == (key not in OF_INDEX) for key in DEFAULTS if key not in ("enabled", "layers"))
    assert resolve({}, {}).describe() == (
        "enabled=true rule=index tolerance=0.7 index_size=null min_step_mib=48 maps=null band=256 sink=0 min_context=4096 layers.include=null "
        "layers.exclude=[]"
    )


@pytest.mark.parametrize("keys, least", [({}, 4096), ({"rule": "match"}, 2048), ({"min_context": "auto"}, 4096)])
def test_min_context_is_where_the_rule_pays(keys, least):
    assert resolve(keys, {}).min_context == least
    assert resolve(keys | {"min_context": 3000}, {}).min_context == 3000


def test_a_wrong_min_context_names_its_choices():
    assert "auto" in refusal({"min_context": "automatic"})
