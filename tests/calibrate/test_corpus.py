import json
from itertools import pairwise

import numpy as np
import pytest

from llmlite.calibrate.corpus import default_corpora, read_corpus
from llmlite.calibrate.rows import encode, token_rows
from llmlite.errors import InputError
from tests.tiny import tiny_tokenizer


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_each_kind_of_record_becomes_a_document(tmp_path):
    source = write(
        tmp_path / "x.jsonl",
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "instances": [{"input": "", "output": "done"}]},
    )
    documents = read_corpus(source).documents
    assert documents[0].text == "plain"
    assert documents[1].messages == documents[2].messages
    assert documents[1].messages == ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert [m["content"] for m in documents[3].messages] == ["do\n\nthis", "done"]
    assert [m["content"] for m in documents[4].messages] == ["do", "done"]
    listed = tmp_path / "x.json"
    listed.write_text(json.dumps([{"text": "plain"}]))
    assert read_corpus(str(listed)).documents == documents[:1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n{nope', "line 2: is not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "none of the fields"),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}\n', "role and a content"),
        ("x.json", b'{"text": "a"}', "JSON list"),
        ("x.txt", b"\xff\xfe", "not UTF-8"),
        ("x.txt", b"  \n", "holds no text"),
    ],
)
def test_a_file_that_is_no_corpus_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_corpus(str(tmp_path / name))


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match="no such text file"):
        read_corpus("missing.txt")


def test_rows_are_shared_out_equally_never_overlap_and_follow_the_seed(tmp_path):
    long, other = tmp_path / "long.txt", tmp_path / "other.txt"
    long.write_text(" ".join(str(n) for n in range(4000)))
    other.write_text("the cat sat on the mat " * 1000)
    corpora = [read_corpus(str(long)), read_corpus(str(other))]
    tokenizer = tiny_tokenizer()
    rows = token_rows(corpora, tokenizer, 40 * 64, 64, seed=0)
    assert rows.ids.shape == (40, 64)
    assert [s["rows"] for s in rows.sources] == [20, 20]
    stream = tokenizer(long.read_text(), verbose=False).input_ids
    starts = [
        start for row in rows.ids[:20] for start in range(len(stream)) if stream[start : start + 64] == row.tolist()
    ]
    assert len(starts) == 20
    assert all(b - a >= 64 for a, b in pairwise(starts))
    again, else_ = (token_rows(corpora, tokenizer, 40 * 64, 64, seed).ids for seed in (0, 1))
    assert np.array_equal(rows.ids, again)
    assert not np.array_equal(rows.ids, else_)


def test_a_short_corpus_gives_what_it_has_and_an_empty_share_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("the cat sat on the mat " * 20)
    corpus = [read_corpus(str(tmp_path / "x.txt"))]
    assert 0 < len(token_rows(corpus, tiny_tokenizer(), 10_000, 16, 0).ids) < 10_000 // 16
    with pytest.raises(InputError, match="too short"):
        token_rows(corpus, tiny_tokenizer(), 10_000, 5_000, 0)


def test_chats_go_through_the_template():
    (web, chat), tokenizer = default_corpora(), tiny_tokenizer()
    text = tokenizer.decode(encode(chat.documents[0], tokenizer))
    assert text.startswith("<|im_start|>user\n")
    assert web.documents[0].text[:20] in tokenizer.decode(encode(web.documents[0], tokenizer))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        token_rows([chat], tokenizer, 1000, 16, 0)
    assert len(default_corpora(chat=False)) == 1
