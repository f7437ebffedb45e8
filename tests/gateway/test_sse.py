"""The stream scanner: what it relays, byte for byte, and what it learns on the way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway_app.event_shape import MAX_EVENT
from gateway_app.sse import StreamScanner, Usage, read_usage, splice_model

ENGINE, CLIENT = "engine-1", "mine"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}

# An engine's way of writing a chunk: (choices, members behind or before them, model) -> the event's JSON.
Style = Callable[[str, str, str], str]


def openai_style(choices: str, more: str, model: str) -> str:
    """Model before the choices, compact."""
    return f'{{"id":"c-1","object":"chat.completion.chunk","created":1,"model":"{model}","choices":{choices}{more}}}'


def llama_style(choices: str, more: str, model: str) -> str:
    """Model behind the choices, compact, as llama.cpp's server writes."""
    return f'{{"choices":{choices},"created":1,"id":"c-1","model":"{model}","object":"chat.completion.chunk"{more}}}'


def python_style(choices: str, more: str, model: str) -> str:
    """Blanks after colons and commas, as json.dumps writes."""
    return f'{{"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model" : "{model}", "choices": {choices}{more}}}'


STYLES: list[Style] = [openai_style, llama_style, python_style]
each_style = pytest.mark.parametrize("style", STYLES)


def choice(content: str | None = None, *, role: bool = False, finish: str | None = None, index: int = 0) -> str:
    """The choices of one chunk."""
    delta: dict[str, Any] = {"role": "assistant"} if role else {}
    if content is not None:
        delta["content"] = content
    return json.dumps([{"index": index, "delta": delta, "finish_reason": finish}], separators=(",", ":"))


def stream(
    style: Style, words: Iterable[str], model: str = ENGINE, *, usage: bool = True, end: str = "\n\n", space: str = " "
) -> bytes:
    """What an engine sends for these words."""
    events = [style(choice("", role=True), "", model), *(style(choice(word), "", model) for word in words)]
    events.append(style(choice(finish="stop"), "", model))
    if usage:
        events.append(style("[]", f',"usage":{json.dumps(USAGE)}', model))
    events.append("[DONE]")
    return "".join(f"data:{space}{event}{end}" for event in events).encode()


def relayed(scanner: StreamScanner, pieces: Iterable[bytes]) -> bytes:
    """All that is relayed of a stream that arrives in these pieces and ends properly."""
    return b"".join([*map(scanner.feed, pieces), scanner.finish()])


def pieces_of(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The data cut at these offsets."""
    offsets = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(offsets)]


def learnt(scanner: StreamScanner) -> tuple[object, ...]:
    """Everything a scanner has to say."""
    flags = scanner.saw_event, scanner.saw_content, scanner.content_events, scanner.done, scanner.overflowed
    return *flags, scanner.usage, scanner.finish_reason, scanner.error


WORDS = ["Hello", ' "quoted" \\', "\n\t", "naïve", " 模型", "😀", "", ' {"model":"engine-1"}', '"model":"engine-1",', "end"]

# --- bytes -------------------------------------------------------------------------------------------------------------


@each_style
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("space", [" ", ""])
def test_a_stream_passes_untouched_when_nothing_is_to_change(style: Style, end: str, space: str) -> None:
    data = stream(style, WORDS, end=end, space=space)
    scanner = StreamScanner(None, keep_usage=True)
    assert relayed(scanner, [data]) == data
    assert relayed(StreamScanner(ENGINE, keep_usage=True), [data]) == data
    assert (scanner.done, scanner.finish_reason, scanner.usage) == (True, "stop", Usage(7, 3))


@each_style
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("name", [None, CLIENT])
def test_a_stream_cut_anywhere_is_relayed_as_the_whole(style: Style, end: str, name: str | None) -> None:
    data = stream(style, ["a 模", '"'], end=end)
    expected = stream(style, ["a 模", '"'], name or ENGINE, end=end, usage=False)
    for cut in range(len(data) + 1):
        assert relayed(StreamScanner(name, keep_usage=False), [data[:cut], data[cut:]]) == expected


@each_style
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_each_byte_of_a_stream_is_relayed_with_the_last_of_its_event(style: Style, end: str) -> None:
    data, expected = stream(style, WORDS, end=end), stream(style, WORDS, CLIENT, usage=False, end=end)
    scanner = StreamScanner(CLIENT, keep_usage=False)
    pieces = [piece for at in range(len(data)) if (piece := scanner.feed(data[at : at + 1]))]
    separator = end.encode()
    assert pieces == [event + separator for event in expected.split(separator)[:-1]]


@each_style
def test_only_the_model_of_the_chunk_is_renamed_never_one_in_the_text(style: Style) -> None:
    data = stream(style, WORDS)
    assert relayed(StreamScanner(CLIENT, keep_usage=True), [data]) == stream(style, WORDS, CLIENT)


@each_style
def test_each_event_leaves_as_soon_as_it_is_whole(style: Style) -> None:
    scanner = StreamScanner(CLIENT, keep_usage=False)
    events = stream(style, ["a", "b", "c"], usage=False).split(b"\n\n")[:-1]
    for event in events:
        assert scanner.feed(event + b"\n") == b""
        assert scanner.feed(b"\n").startswith(b"data: ")


@settings(max_examples=150, deadline=None)
@given(
    style=st.sampled_from(STYLES),
    words=st.lists(st.text(max_size=12), max_size=6),
    end=st.sampled_from(["\n\n", "\r\n\r\n"]),
    space=st.sampled_from(["", " "]),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
    name=st.sampled_from([None, CLIENT, ENGINE, "näme", "a\\b"]),
    keep_usage=st.booleans(),
)
def test_any_chunking_of_any_stream_gives_the_expected_bytes(
    style: Style, words: list[str], end: str, space: str, cuts: list[int], name: str | None, keep_usage: bool
) -> None:
    data = stream(style, words, end=end, space=space)
    written = ENGINE if name is None else json.dumps(name)[1:-1]
    scanner = StreamScanner(name, keep_usage)
    assert relayed(scanner, pieces_of(data, cuts)) == stream(style, words, written, usage=keep_usage, end=end, space=space)
    assert scanner.usage == Usage(7, 3)
    assert scanner.content_events == sum(1 for word in words if word)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
members = st.sampled_from(["model", "choices", "usage", "error", "object", "id", "x"])
deltas = st.fixed_dictionaries({}, optional={"role": json_values, "content": json_values, "tool_calls": json_values})
choices = st.lists(
    st.fixed_dictionaries({"delta": deltas}, optional={"index": st.integers(0, 2), "finish_reason": json_values}), max_size=2
)
chunks = st.fixed_dictionaries(
    {"object": st.just("chat.completion.chunk"), "model": st.just(ENGINE), "choices": choices},
    optional={"usage": json_values, "error": st.none(), "created": st.integers()},
)
payloads = st.one_of(
    chunks.map(json.dumps),
    st.dictionaries(members, json_values, max_size=4).map(json.dumps),
    json_values.map(lambda value: json.dumps(value, ensure_ascii=False)),
    st.text(max_size=20).map(lambda text: text.replace("\n", "").replace("\r", "")),
)
lines = st.one_of(
    payloads.map("data: {}".format), st.sampled_from([": ping", "event: x", "id: 1", "retry: 5", "data", "data:", "error: no"])
)
blocks = st.lists(lines, min_size=0, max_size=3)
line_ends = st.sampled_from(["\n", "\r\n"])


@settings(max_examples=300, deadline=None)
@given(
    events=st.lists(st.tuples(blocks, line_ends), max_size=6),
    tail=st.sampled_from(["", "data: {", "data: [DONE]", "\n", "\r"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=10),
    name=st.sampled_from([None, CLIENT]),
    keep_usage=st.booleans(),
)
def test_whatever_comes_any_chunking_is_relayed_and_understood_as_the_whole(
    events: list[tuple[list[str], str]], tail: str, cuts: list[int], name: str | None, keep_usage: bool
) -> None:
    text = "".join(end.join([*block, "", ""]) for block, end in events) + tail
    data = text.encode("utf-8", "surrogatepass")
    whole, cut = StreamScanner(name, keep_usage), StreamScanner(name, keep_usage)
    assert relayed(whole, [data]) == relayed(cut, pieces_of(data, cuts))
    assert learnt(whole) == learnt(cut)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200) | st.lists(st.sampled_from([b"data:", b"\n", b"\r", b"{", b'"', b"\\", b"\xff"])).map(b"".join)
)
def test_bytes_that_are_no_stream_at_all_pass_untouched(data: bytes) -> None:
    assume(b"error" not in data)
    for name in (None, CLIENT):
        assert relayed(StreamScanner(name, keep_usage=False), [data[:50], data[50:]]) == data


def test_a_line_break_inside_a_text_ends_the_line_also_where_texts_are_expected() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}],"model":"%b"}\n\n'
    scanner = StreamScanner(CLIENT, keep_usage=False)
    assert scanner.feed(event % (b"a", b"x") * 2) == event % (b"a", b"mine") * 2
    broken = event % (b"a\nb", b"x")
    assert scanner.feed(broken) == broken
    cut_short = b'data: {"choices":[{"index":0,"delta":{"content":"a\n\n'
    assert scanner.feed(cut_short + event % (b'"b', b"x")) == cut_short + event % (b'"b', b"x")
    assert scanner.content_events == 2


def test_bytes_that_are_not_utf8_survive_in_a_renamed_event() -> None:
    def event(model: bytes) -> bytes:
        return b'data: {"model":"%b","choices":[{"index":0,"delta":{"role":"assistant","content":"\xf0\x9f"}}]}\n\n' % model

    scanner = StreamScanner(CLIENT, keep_usage=False)
    for _ in range(3):
        assert scanner.feed(event(b"engine-1")) == event(b"mine")
    assert scanner.content_events == 3


# --- the model's name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ('{"x":{"model":"a"},"model":"a"}', '{"x":{"model":"a"},"model":"mine"}'),
        ('{"model":"a","model":"b"}', '{"model":"mine","model":"b"}'),
        ('{"mod\\u0065l":"a"}', '{"mod\\u0065l":"mine"}'),
        ('{ "model"\t:\t"a\\"b" }', '{ "model"\t:\t"mine" }'),
        ('{"x\\"model":"a"}', '{"x\\"model":"a"}'),
        ('{"x":["model","a"]}', '{"x":["model","a"]}'),
        ('{"model":null}', '{"model":null}'),
        ('{"model":{"model":"a"}}', '{"model":{"model":"a"}}'),
        ('{"choices":[{"model":"a"}]}', '{"choices":[{"model":"a"}]}'),
        ('["model","a"]', '["model","a"]'),
        ('{"model":"a"', '{"model":"a"'),
        ('{"model":"a"} x', '{"model":"a"} x'),
    ],
)
def test_the_first_model_at_the_top_is_replaced_and_no_other(payload: str, expected: str) -> None:
    scanner = StreamScanner(CLIENT, keep_usage=False)
    assert scanner.feed(f"data: {payload}\n\n".encode()) == f"data: {expected}\n\n".encode()
    assert splice_model(payload.encode(), CLIENT) == expected.encode()


@each_style
def test_an_event_that_differs_from_those_before_is_looked_at_anew(style: Style) -> None:
    scanner = StreamScanner(CLIENT, keep_usage=False)
    scanner.feed(b"data: " + style(choice("a", role=True), "", ENGINE).encode() + b"\n\n")
    odd = ['{"error":null,"x":{"model":"engine-1"}}', style(choice("b"), ',"logprobs":{"model":"engine-1"}', ENGINE)]
    for payload in [style(choice("c"), "", ENGINE), *odd, style(choice("d"), "", ENGINE), *odd]:
        expected = payload if payload == odd[0] else payload.replace(ENGINE, CLIENT, 1)
        assert scanner.feed(f"data: {payload}\n\n".encode()).decode() == f"data: {expected}\n\n"


def test_a_clock_that_ticks_behind_the_choices_changes_nothing() -> None:
    def event(created: int, model: str) -> bytes:
        return b'data: {"choices":[{"delta":{"content":"x"},"index":0}],"created":%d,"model":"%b"}\n\n' % (
            created,
            model.encode(),
        )

    scanner = StreamScanner(CLIENT, keep_usage=False)
    for created in (1764000008, 1764000009, 1764000010, 9, 10):
        assert scanner.feed(event(created, "engine-1")) == event(created, CLIENT)


def test_an_engine_that_changes_its_name_by_a_digit_is_still_renamed() -> None:
    def event(model: str) -> bytes:
        return b'data: {"choices":[{"delta":{"content":"x"},"index":0}],"model":"%b"}\n\n' % model.encode()

    scanner = StreamScanner("m1", keep_usage=False)
    assert b"".join(map(scanner.feed, [event("m1"), event("m1"), event("m2"), event("m3"), event("m1")])) == event("m1") * 5


def test_data_on_several_lines_is_one_text() -> None:
    scanner = StreamScanner(CLIENT, keep_usage=False)
    lines = b'event: x\ndata: {"choices":\r\ndata:[%b],\n: between\ndata: "model":"%b",\ndata:"usage":null}\n\n'
    for choices in (
        b"",
        b'{"delta":{"content":"a"}}',
        b'{"delta":{"content":"b"}}',
        b'{"text":\ndata:"c"}',
        b'{"text":\ndata:"d"}',
    ):
        assert scanner.feed(lines % (choices, b"engine")) == lines % (choices, b"mine")
    assert scanner.content_events == 4


# --- usage -------------------------------------------------------------------------------------------------------------


@each_style
def test_the_usage_event_reaches_only_who_asked_and_is_always_noted(style: Style) -> None:
    for keep in (True, False):
        scanner = StreamScanner(CLIENT, keep)
        assert relayed(scanner, [stream(style, ["a"])]) == stream(style, ["a"], CLIENT, usage=keep)
        assert scanner.usage == Usage(7, 3, None)


def test_usage_on_an_event_with_choices_is_noted_and_the_event_kept() -> None:
    data = b'data: {"object":"text_completion","choices":[{"text":"x","index":0}],"usage":%b}\n\n' % json.dumps(USAGE).encode()
    scanner = StreamScanner(None, keep_usage=False)
    assert scanner.feed(data) == data
    assert (scanner.usage, scanner.saw_content) == (Usage(7, 3), True)


def test_usage_that_grows_with_every_event_is_followed() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}],"usage":{"prompt_tokens":7,"completion_tokens":%d}}\n\n'
    scanner = StreamScanner(None, keep_usage=False)
    for count in (1, 2, 3, 4):
        assert scanner.feed(event % count) == event % count
        assert scanner.usage == Usage(7, count)


def test_an_event_without_choices_that_brings_no_usage_is_kept() -> None:
    for data in (b'data: {"choices":[],"prompt_filter_results":[]}\n\n', b'data: {"choices":[],"usage":null}\n\n'):
        assert StreamScanner(None, keep_usage=False).feed(data) == data


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}, Usage(5, 2, 4)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}, Usage(5, 2)),
        ({"prompt_tokens": 5, "total_tokens": 5}, Usage(5, 0)),
        ({"prompt_tokens": 5, "completion_tokens": "2", "prompt_tokens_details": {"cached_tokens": -1}}, Usage(5, 0)),
        ({"prompt_tokens": True}, None),
        ({"completion_tokens": 5}, None),
        ("much", None),
        (None, None),
    ],
)
def test_usage_is_read_with_care(said: object, noted: Usage | None) -> None:
    body = json.dumps({"choices": [], "usage": said}).encode()
    scanner = StreamScanner(None, keep_usage=True)
    scanner.feed(b"data: " + body + b"\n\n")
    assert scanner.usage == noted
    assert read_usage(body) == (noted, None)


# --- what else is learnt -----------------------------------------------------------------------------------------------


def test_comments_and_other_fields_are_no_event() -> None:
    scanner = StreamScanner(CLIENT, keep_usage=False)
    data = b": ping\n\nevent: message\n\nid: 1\nretry: 10\n\n\n\n"
    assert scanner.feed(data) == data
    assert not scanner.saw_event


def test_an_event_with_only_a_role_is_an_event_but_no_content() -> None:
    scanner = StreamScanner(None, keep_usage=False)
    scanner.feed(f"data: {openai_style(choice('', role=True), '', ENGINE)}\n\n".encode())
    assert (scanner.saw_event, scanner.saw_content, scanner.content_events) == (True, False, 0)


@pytest.mark.parametrize(
    "what",
    [
        {"delta": {"content": "x"}},
        {"delta": {"reasoning_content": "x"}},
        {"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}},
        {"text": "x"},
    ],
)
def test_whatever_the_model_wrote_is_content(what: dict[str, Any]) -> None:
    scanner = StreamScanner(None, keep_usage=False)
    scanner.feed(b"data: " + json.dumps({"choices": [what]}).encode() + b"\n\n")
    assert (scanner.saw_content, scanner.content_events) == (True, 1)


@pytest.mark.parametrize(("payload", "reason"), [('"length"', "length"), ("null", None), ('""', None), ("3", None)])
def test_the_finish_reason_is_noted(payload: str, reason: str | None) -> None:
    scanner = StreamScanner(None, keep_usage=False)
    scanner.feed(b'data: {"choices":[{"delta":{},"finish_reason":%b}]}\n\n' % payload.encode())
    assert scanner.finish_reason == reason


@each_style
def test_a_finish_reason_that_rides_on_text_like_the_text_before_is_seen(style: Style) -> None:
    scanner = StreamScanner(CLIENT, keep_usage=False)
    payloads = [choice("a", role=True), choice("b"), choice("c"), choice("d", finish="length")]
    for payload in payloads:
        scanner.feed(f"data: {style(payload, '', ENGINE)}\n\n".encode())
    assert (scanner.finish_reason, scanner.content_events) == ("length", 4)


def test_done_is_seen_with_and_without_its_blank_line() -> None:
    for data, at_once in (
        (b"data: [DONE]\n\n", True),
        (b"data:[DONE]\r\n\r\n", True),
        (b"data: [DONE]\n", False),
        (b"data: [DONE]", False),
    ):
        scanner = StreamScanner(CLIENT, keep_usage=False)
        relayed_before = scanner.feed(data)
        assert scanner.done is at_once
        assert relayed_before + scanner.finish() == data
        assert scanner.done


def test_an_unfinished_last_event_is_still_spliced_dropped_or_passed() -> None:
    for tail, expected in ((b'data: {"model":"a"}', b'data: {"model":"mine"}'), (b'data: {"mod', b'data: {"mod'), (b"\n", b"\n")):
        scanner = StreamScanner(CLIENT, keep_usage=False)
        assert scanner.feed(tail) == b""
        assert scanner.finish() == expected
        assert scanner.finish() == b""
    scanner = StreamScanner(CLIENT, keep_usage=False)
    assert relayed(scanner, [b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n']) == b""
    assert scanner.usage == Usage(1, 0)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (b'data: {"error":{"code":400,"message":"na\xc3\xafve","type":"x"}}\n\n', {"code": 400, "message": "naïve", "type": "x"}),
        (b'data: {"error":"it broke"}\r\n\r\n', {"message": "it broke"}),
        (b'error: {"code":500,"message":"old"}\n\n', {"code": 500, "message": "old"}),
        (b"error: plain\n\n", {"message": "plain"}),
        (b"error:plain\r\n\r\n", {"message": "plain"}),
        (b'data: {"object":"error","message":"m","code":404}\n\n', {"object": "error", "message": "m", "code": 404}),
        (b'data: {"choices":[],"error":{"message":"late"}}\n\n', {"message": "late"}),
    ],
)
def test_an_engines_error_is_noted_and_withheld_with_all_that_follows(event: bytes, error: dict[str, Any]) -> None:
    before = b'data: {"choices":[]}\n\n'
    scanner = StreamScanner(None, keep_usage=False)
    assert scanner.feed(before + event + before) == before
    assert (scanner.error, scanner.saw_event) == (error, True)
    assert relayed(scanner, [b"data: [DONE]\n\n", b"data: x"]) == b""
    assert not scanner.done


@pytest.mark.parametrize("payload", ['{"error":null,"choices":[]}', '{"choices":[{"error":{"message":"no"}}]}', '"error"'])
def test_what_only_looks_like_an_error_passes(payload: str) -> None:
    scanner = StreamScanner(None, keep_usage=False)
    assert scanner.feed(f"data: {payload}\n\n".encode()) == f"data: {payload}\n\n".encode()
    assert scanner.error is None


# --- roles -------------------------------------------------------------------------------------------------------------


@each_style
def test_a_first_delta_without_a_role_is_given_one_and_later_ones_are_not(style: Style) -> None:
    data = "".join(f"data: {style(choice(word), '', ENGINE)}\n\n" for word in "abcd").encode()
    expected = data.replace(b'{"content":"a"', b'{"role":"assistant","content":"a"')
    assert relayed(StreamScanner(None, keep_usage=False), [data]) == expected
    assert relayed(StreamScanner(CLIENT, keep_usage=False), [data]) == expected.replace(ENGINE.encode(), CLIENT.encode())


def test_each_choice_is_given_its_own_role() -> None:
    data = b'data: {"object":"chat.completion.chunk","choices":[{"index":%d,"delta":{"content":"a"}}]}\n\n'
    scanner = StreamScanner(None, keep_usage=False)
    said = [scanner.feed(data % index).count(b'"role":"assistant"') for index in (0, 0, 0, 1, 0, 1, 2)]
    assert said == [1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ("{}", '{"role":"assistant"}'),
        ("{ }", '{"role":"assistant" }'),
        ('{"role":null,"content":"x"}', '{"role":"assistant","content":"x"}'),
        ('{"role":"tool"}', '{"role":"tool"}'),
        ('{"content":{"role":"x"}}', '{"role":"assistant","content":{"role":"x"}}'),
        ("null", "null"),
    ],
)
def test_a_role_is_put_where_it_is_missing(delta: str, expected: str) -> None:
    event = 'data: {"object":"chat.completion.chunk","model":"a","choices":[ {"index":0,"delta":%s} ]}\n\n'
    assert StreamScanner(None, keep_usage=False).feed((event % delta).encode()) == (event % expected).encode()


def test_text_completions_have_no_roles() -> None:
    for payload in ('{"object":"text_completion","choices":[{"text":"x"}]}', '{"choices":[{"delta":{"content":"x"}}]}'):
        data = f"data: {payload}\n\n".encode()
        assert StreamScanner(None, keep_usage=False).feed(data) == data


# --- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 100_000, 3 * MAX_EVENT])
def test_past_the_bound_an_event_and_all_behind_it_pass_unseen(size: int) -> None:
    first, usage = b'data: {"model":"a"}\n\n', b'data: {"model":"a","choices":[],"usage":{"prompt_tokens":1}}\n\n'
    data = first + b'data: {"model":"a","x":"' + b"x" * MAX_EVENT + b'"}\n\n' + usage
    scanner = StreamScanner(CLIENT, keep_usage=False)
    assert relayed(scanner, [data[at : at + size] for at in range(0, len(data), size)]) == data.replace(b'"a"', b'"mine"', 1)
    assert (scanner.overflowed, scanner.saw_event, scanner.usage) == (True, True, None)


def test_the_bound_holds_for_an_event_that_is_like_those_before_and_for_one_that_never_ends() -> None:
    event = b'data: {"model":"%b","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
    long = event % (b"a", b"x" * MAX_EVENT)
    for big in (long, long[:-2]):
        scanner = StreamScanner(CLIENT, keep_usage=False)
        assert scanner.feed(event % (b"a", b"x") * 2) == event % (b"mine", b"x") * 2
        assert scanner.feed(big) == big
        assert (scanner.overflowed, scanner.feed(b"data: x"), scanner.finish()) == (True, b"data: x", b"")


def test_an_event_that_never_ends_is_not_kept_beyond_the_bound() -> None:
    scanner = StreamScanner(CLIENT, keep_usage=False)
    kept = 0
    while not scanner.overflowed:
        kept += 65536 - len(scanner.feed(b"x" * 65536))
        assert kept <= MAX_EVENT + 65536
    assert kept <= 0


def test_an_event_of_just_the_bound_is_still_read() -> None:
    filler = MAX_EVENT - len(b'data: {"model":"a","x":""}\n\n')
    event = b'data: {"model":"%b","x":"' + b"x" * filler + b'"}\n\n'
    scanner = StreamScanner(CLIENT, keep_usage=False)
    assert relayed(scanner, pieces_of(event % b"a", [5, 70_000, 1_000_000])) == event % b"mine"
    assert not scanner.overflowed


def test_json_nested_too_deeply_passes_untouched() -> None:
    data = b'data: {"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n"
    assert StreamScanner(CLIENT, keep_usage=False).feed(data) == data
    assert splice_model(data[6:-2], CLIENT) == data[6:-2]


# --- whole answers -----------------------------------------------------------------------------------------------------


@given(value=st.dictionaries(members, json_values, max_size=5), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_whole_answer_keeps_every_byte_but_the_models(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    for model in (value.get("model"), "engine"):
        body = json.dumps({**value, "model": model}, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        spelling = json.dumps(model, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        expected = body
        if isinstance(model, str) and model != CLIENT:
            start, end = body.index(b'"model": ' + spelling), len(b'"model": ' + spelling)
            if body.count(b'"model": ' + spelling) > 1:
                continue  # which of them is at the top is the scanner's business in the other tests
            expected = body[:start] + b'"model": "mine"' + body[start + end :]
        assert splice_model(body, CLIENT) == expected


@pytest.mark.parametrize("body", [b"", b"null", b"[1]", b"not json", b'{"a":1}', b'{"model":7}', b"\xff"])
def test_a_body_without_a_model_is_left_alone(body: bytes) -> None:
    assert splice_model(body, CLIENT) == body


def test_a_name_that_is_already_right_is_left_as_it_is_spelt() -> None:
    for spelling in ('"na\\u00efve"', '"naïve"'):
        body = f'{{"model":{spelling}}}'.encode()
        assert splice_model(body, "naïve") == body
        assert StreamScanner("naïve", keep_usage=False).feed(b"data: " + body + b"\n\n") == b"data: " + body + b"\n\n"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b'{"choices":3,"usage":[]}', b"\xff\xfe", b'{"usage":{}}', b'data: {"choices":[]}\n\n',
        b'{"choices":[{"message":', b'{"choices":' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_whole_answer_is_told_apart(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_usage(body)


def test_nothing_is_read_from_odd_choices() -> None:
    assert read_usage(b'{"choices":[null,{"finish_reason":1}]}') == (None, None)


def test_a_stream_with_an_event_past_the_bound_is_still_seen_to_be_done() -> None:
    scanner = StreamScanner("m", keep_usage=False)
    stream = b"data: " + b"x" * (MAX_EVENT + 1) + b"\n\ndata: [DONE]\n\n"
    relayed = b"".join(scanner.feed(stream[at : at + 60_000]) for at in range(0, len(stream), 60_000)) + scanner.finish()
    assert relayed == stream
    assert scanner.done


def test_usage_and_finish_reason_of_a_whole_answer_are_read() -> None:
    answer = {"choices": [{"finish_reason": None}, {"finish_reason": "tool_calls"}], "usage": USAGE}
    assert read_usage(json.dumps(answer).encode()) == (Usage(7, 3), "tool_calls")
