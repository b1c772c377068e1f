"""Server-sent events are cut the same however the bytes arrive."""

import pytest

pytest.importorskip("httpx")

from llmlite.serve.upstream.sse import MAX_EVENT, Malformed, Splitter

EVENTS = [
    b": a comment\n\n",
    'data: {"choices":[{"delta":{"content":"é🦙 \\n\\n"}}]}\n\n'.encode(),
    b'event: error\ndata: {"type":"error",\ndata: "error":{}}\nid: 7\n\n',
    b'data:{"a":1}\n\n',
    b"data: [DONE]\n\n",
]


def cut(pieces):
    splitter = Splitter()
    return [event for piece in pieces for event in splitter.feed(piece)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_split_at_every_byte(newline):
    raw = [event.replace(b"\n", newline) for event in EVENTS]
    text = b"".join(raw)
    whole = cut([text])
    assert [event.raw for event in whole] == raw
    assert [event.last for event in whole] == [False, False, True, False, True]
    assert whole[1].data["choices"][0]["delta"]["content"] == "é🦙 \n\n"
    assert whole[2].data == {"type": "error", "error": {}}
    for place in range(len(text)):
        assert cut([text[:place], text[place:]]) == whole, place
    assert cut([text[place : place + 1] for place in range(len(text))]) == whole


def test_half_an_event_is_none():
    assert cut([EVENTS[3][:-1]]) == []


@pytest.mark.parametrize(
    "text", [b"data: {\n\n", b"data: [1]\n\n", b"<html>\n\n", b'data: "\xff"\n\n', b"data: " + b"[" * 100_000 + b"\n\n"]
)
def test_what_is_no_event_with_json(text):
    with pytest.raises(Malformed):
        cut([text])


def test_an_event_without_an_end():
    with pytest.raises(Malformed, match="more than"):
        cut([b"x" * 2**20] * (MAX_EVENT // 2**20 + 1))


def test_other_data_leaves_the_other_lines():
    (event,) = cut([b'event: x\r\nid: 1\r\ndata: {"model":"a"}\r\n\r\n'])
    assert event.with_data({"model": "é"}) == 'event: x\nid: 1\ndata: {"model":"é"}\n\n'.encode()
