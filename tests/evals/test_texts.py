"""Texts to judge on, and what is said of those that can't be used."""

import hashlib
import sys
from types import SimpleNamespace

import pytest

from llmlite.errors import InputError
from llmlite.evals.texts import read_text, read_texts


def test_a_text_file_is_read_whole(tmp_path):
    file = tmp_path / "wiki.test.raw"
    file.write_bytes(" one\n\ntwo é \n".encode())
    text = read_text(str(file))
    assert text.text == " one\n\ntwo é \n"
    assert text.name == "wiki_test", "a dot in the name would break texts.<name>.perplexity"
    assert text.digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_json_lines_are_joined_by_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert read_text(str(file)).text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b" \n", "holds no text"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', "holds chats"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, sentence):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_text(str(file))


@pytest.mark.parametrize("source", ["nowhere/wiki.raw", "./wiki", "/wiki", "~/wiki", "wiki.jsonl"])
def test_a_missing_file_is_refused(source):
    with pytest.raises(InputError, match="no such text file"):
        read_text(source)


def test_a_name_that_is_no_file_is_said_to_be_none_where_data_sets_cannot_be_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"nowhere: no such file; to load a data set of that name, .* extra 'eval'"):
        read_text("nowhere")


@pytest.mark.parametrize(
    ("source", "name", "asked"),
    [
        ("ptb_text_only", "ptb_text_only", ("ptb_text_only", None, "test")),
        ("owner/name.v1", "name_v1", ("owner/name.v1", None, "test")),
        ("owner/wiki:wikitext-2.0", "wiki-wikitext-2_0", ("owner/wiki", "wikitext-2.0", "test")),
        ("owner/wiki:raw:validation", "wiki-raw-validation", ("owner/wiki", "raw", "validation")),
    ],
)
def test_whatever_does_not_look_like_a_file_is_the_test_split_of_a_data_set(monkeypatch, source, name, asked):
    class Rows(dict):
        column_names = ("text",)

    calls = []

    def load_dataset(path, config=None, split=None, **more):
        calls.append((path, config, split))
        return Rows(text=["one", "", "two"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    text = read_text(source)
    assert (text.name, text.text) == (name, "one\n\n\n\ntwo")
    assert calls == [asked]


def test_two_texts_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("words")
    with pytest.raises(InputError, match="both called 'same'"):
        read_texts((str(tmp_path / "a/same.txt"), str(tmp_path / "b/same.txt")))
