"""Text deltas: nothing split, nothing of a stop string let out, whatever the tokens are cut like."""

import random

import pytest

from llmlite.serve.text import TextStream

TEXT = "naïve 🦙🦙‍ 你好 end <|im_ stop</s>"


def run(pieces, stops=()):
    stream = TextStream(stops)
    out = []
    for piece in pieces:
        out.append(stream.push(piece))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


def cut(data, random_source):
    while data:
        size = random_source.randint(1, 5)
        yield data[:size]
        data = data[size:]


def test_characters_are_never_split():
    for seed in range(50):
        out = run(cut(TEXT.encode(), random.Random(seed)))
        assert "".join(out) == TEXT
        assert not any("\ufffd" in delta for delta in out)


def test_bytes_come_out_as_soon_as_the_character_is_whole():
    assert run([b"a", "🦙".encode()[:3], "🦙".encode()[3:], b"b"]) == ["a", "", "🦙", "b", ""]


def test_an_incomplete_character_at_the_end_is_replaced():
    assert "".join(run([b"ok", "你".encode()[:2]])) == "ok\ufffd"


@pytest.mark.parametrize("stop", ["<|im_", "🦙🦙", "end", "n", "好 end <", "</s>"])
def test_text_ends_before_the_stop_string_however_it_is_cut(stop):
    for seed in range(50):
        out = run(cut(TEXT.encode(), random.Random(seed)), (stop, "never"))
        assert "".join(out) == TEXT[: TEXT.index(stop)]


def test_what_only_looked_like_a_stop_string_is_let_out():
    assert run([b"a", b"#", b"#b", b"#", b"##c"], ("####",)) == ["a", "", "##b", "", "###c", ""]
    assert "".join(run([b"x", b"##"], ("###",))) == "x##"


def test_emitted_never_runs_ahead_of_what_was_handed_out():
    stream = TextStream(("stop",))
    handed = ""
    for byte in "test sto sto🦙p st".encode():
        handed += stream.push(bytes([byte]))
        assert stream.emitted == len(handed) <= stream.length
    assert not handed.endswith("st")
    assert handed + stream.finish() == "test sto sto🦙p st"
