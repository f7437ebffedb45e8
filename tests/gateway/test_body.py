"""What is sent to an engine for what a client sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_app.endpoints.body import parse
from gateway_app.errors import ApiError
from models_app.contracts.traits import CHAT, COMPLETIONS

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "ours", "messages": MESSAGES, **fields}).encode()


def test_a_body_that_needs_no_change_is_not_touched() -> None:
    raw = b' {"messages" : [{"role":"user","content":"\\u4f60"}],  "model":"ours", "x": 1e400}\n'
    assert parse(raw, CHAT).body_for("ours") == raw


def test_the_model_is_spliced_and_nothing_else() -> None:
    raw = b'{"messages":[{"role":"user","content":"say \\"model\\": \\"ours\\""}], "model" : "ours","n":1}'
    assert parse(raw, CHAT).body_for("theirs/x") == raw.replace(b'"model" : "ours"', b'"model" : "theirs/x"')


def test_usage_is_asked_for_in_front() -> None:
    raw = chat(stream=True)
    sent = parse(raw, CHAT).body_for("ours")
    assert sent == b'{"stream_options":{"include_usage":true},' + raw[1:]
    wanted = chat(stream=True, stream_options={"include_usage": True})
    assert parse(wanted, CHAT).wants_usage
    assert parse(wanted, CHAT).body_for("ours") == wanted
    for options in (None, {}, {"include_usage": False, "x": 1}):
        call = parse(chat(stream=True, stream_options=options), CHAT)
        assert not call.wants_usage
        assert json.loads(call.body_for("ours"))["stream_options"] == {**(options or {}), "include_usage": True}


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"forbidden","messages":[{"role":"user"}],"model":"ours"}',
        b'{"model":"forbidden","messages":[{"role":"user"}],"mod\\u0065l":"ours"}',
        b'{"\\u006dodel":"ours","messages":[{"role":"user"}]}',
        b'{"model":"o\\u0075rs","messages":[{"role":"user"}]}',
        b'{"model":"ours","messages":[{"role":"user","model":"x"}]}',
    ],
)
def test_a_body_with_two_readings_is_written_anew_with_one(raw: bytes) -> None:
    call = parse(raw, CHAT)
    assert call.model == "ours"
    for name in ("ours", "theirs"):
        sent = call.body_for(name)
        assert b"forbidden" not in sent
        assert json.loads(sent)["model"] == name
        assert sent.count(b'"model"') == 1 + (b'"x"' in raw)


def test_a_value_that_cannot_be_written_again_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        parse(b'{"model":"ours","model":"ours","messages":[{"role":"user"}],"x":1e999}', CHAT).body_for("ours")
    assert caught.value.status == 400


def test_prompts_may_be_texts_or_tokens() -> None:
    for prompt in ("hi", ["a", "b"], [1, 2], [[1, 2], [3]]):
        parse(json.dumps({"model": "ours", "prompt": prompt}).encode(), COMPLETIONS)
    for wrong in (b"null", b"7", b"{}", b"[null]", b'[{"a":1}]'):
        with pytest.raises(ApiError) as caught:
            parse(b'{"model":"ours","prompt":' + wrong + b"}", COMPLETIONS)
        assert caught.value.param == "prompt"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    extra=st.dictionaries(st.sampled_from(["tools", "user", "metadata", "x", "модель"]), json_values, max_size=4),
    stream=st.booleans(),
    name=st.text(min_size=1, max_size=20),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_the_engine_reads_what_the_client_wrote(
    extra: dict[str, Any], stream: bool, name: str, ascii_only: bool, indent: int | None
) -> None:
    fields = {**extra, "model": name, "messages": MESSAGES, "stream": stream}
    text = json.dumps(fields, ensure_ascii=ascii_only, indent=indent)
    call = parse(text.encode(), CHAT)
    assert call.model == name
    for there in (name, "there"):
        sent = json.loads(call.body_for(there))
        expected = {**fields, "model": there}
        if stream:
            expected["stream_options"] = {"include_usage": True}
        assert sent == expected
