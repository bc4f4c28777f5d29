"""What requests may ask of MAC: which keys and values are taken, and what is said of the others."""

import math
from types import SimpleNamespace

import pytest

from vllm_mac import startup
from vllm_mac.config import MacConfig
from vllm_mac.per_request import NOTHING, Ask, RequestError, read

pytestmark = pytest.mark.cpu
AUDITED, MATCHED, INDEXED = MacConfig(rule="match", audit=0.01), MacConfig(rule="match"), MacConfig()


@pytest.mark.parametrize(
    "sent, asked",
    [
        (None, NOTHING),
        ({}, NOTHING),
        ({"session_id": "x", "machine_id": 3, "macro": 1, "max": 2}, NOTHING),
        ({"mac": "on"}, NOTHING),
        ({"mac_threshold": 0}, NOTHING),
        ({"mac": "off"}, Ask(exact=True)),
        ({"mac": "audit"}, Ask(audited=True)),
        ({"mac_threshold": 0.75}, Ask(slack=0.0625)),
        ({"mac_threshold": 1}, Ask(slack=0.0)),
        ({"mac": "audit", "mac_threshold": 0.5}, Ask(audited=True, slack=0.25)),
    ],
)
def test_what_may_be_asked_for(sent, asked):
    assert read(sent, AUDITED) == asked


@pytest.mark.parametrize(
    "sent, texts",
    [
        ({"mac": "maybe"}, ["mac: received 'maybe' (str); must be one of 'on', 'off', 'audit'"]),
        ({"mac": "OFF"}, ["mac: received 'OFF'"]),
        ({"mac": 1}, ["mac: received 1 (int)"]),
        ({"mac": False}, ["mac: received False (bool)"]),
        ({"mac": None}, ["mac: received None"]),
        ({"mac": ["off"]}, ["mac: received ['off'] (list)"]),
        ({"mac_threshold": 1.5}, ["mac_threshold: received 1.5 (float); must be a number from 0 to 1"]),
        ({"mac_threshold": -0.1}, ["mac_threshold: received -0.1"]),
        ({"mac_threshold": "0.9"}, ["mac_threshold: received '0.9' (str)"]),
        ({"mac_threshold": True}, ["mac_threshold: received True (bool)"]),
        ({"mac_threshold": math.nan}, ["mac_threshold: received nan (float)"]),
        ({"mac_threshold": math.inf}, ["mac_threshold: received inf"]),
        ({"mac_threshold": None}, ["mac_threshold: received None"]),
        ({"mac_treshold": 0.9}, ["mac_treshold: unknown key, received 0.9 (float); did you mean 'mac_threshold'?"]),
        ({"Mac": "off"}, ["Mac: unknown key, received 'off' (str); did you mean 'mac'? must be one of mac, mac_"]),
        ({"macthreshold": 1}, ["macthreshold: unknown key, received 1 (int); did you mean 'mac_threshold'?"]),
        ({"mac_audit_everything": 1}, ["mac_audit_everything: unknown key, received 1 (int); "]),
        ({"mac": "of", "mac_threshold": 2}, ["mac: received 'of'", "mac_threshold: received 2"]),
    ],
)
def test_everything_else_is_refused_with_field_value_and_choices(sent, texts):
    with pytest.raises(RequestError) as refused:
        read(sent, AUDITED)
    assert all(text in str(refused.value) for text in texts), str(refused.value)
    # HTTP 400 by vLLM's classes, and by Python's in process.
    assert refused.value.parameter == "vllm_xargs" and isinstance(refused.value, ValueError)


def test_audits_need_buffers():
    with pytest.raises(RequestError, match=r"mac: received 'audit', .* no buffers.*with audit at 0.*'on', 'off'"):
        read({"mac": "audit"}, MATCHED)
    assert read({"mac": "off", "mac_threshold": 0.5}, MATCHED) == Ask(exact=True, slack=0.25)


@pytest.mark.parametrize("sent, asked", [({}, NOTHING), ({"mac": "on"}, NOTHING), ({"mac": "off"}, Ask(exact=True))])
def test_what_may_be_asked_of_an_index(sent, asked):
    assert read(sent, INDEXED) == asked


@pytest.mark.parametrize("sent, text", [
    ({"mac": "audit"}, "mac: received 'audit', and an engine with rule: index has no hits to audit; choose from 'on', 'off'"),
    ({"mac": "maybe"}, "mac: received 'maybe' (str); must be one of 'on', 'off'"),
    ({"mac_threshold": 0.9}, "mac_threshold: received 0.9 (float), and an engine with rule: index has no thresholds; leave it out"),
    ({"mac_threshold": 2}, "mac_threshold: received 2 (int), and an engine with rule: index has no thresholds; leave it out"),
    ({"mac": "off", "mac_threshold": 0.0}, "or choose mac from 'on', 'off'"),
])  # fmt: skip
def test_what_only_matches_have(sent, text):
    with pytest.raises(RequestError) as refused:
        read(sent, INDEXED)
    assert text in str(refused.value)


@pytest.mark.parametrize("names, served", [
    ((None, {}), False), (("TRITON_ATTN", {}), False), (("MAC", {}), True), ((None, {"full_attention": "MAC"}), True),
    (("MAC", {"full_attention": "TRITON_ATTN"}), True), ((None, {"sliding_window": "TRITON_ATTN"}), False),
])  # fmt: skip
def test_engines_without_mac_are_left_alone(names, served):
    member = lambda name: name and SimpleNamespace(name=name)
    attention = SimpleNamespace(backend=member(names[0]), backend_per_kind={k: member(v) for k, v in names[1].items()})
    assert (startup.chosen_by(attention) is not None) == served
