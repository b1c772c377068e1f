"""Texts to judge on, and what is said of those that can't be used."""

import hashlib

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


def test_a_missing_file_is_refused():
    with pytest.raises(InputError, match=r"wiki.raw: no such text file"):
        read_text("nowhere/wiki.raw")


def test_two_texts_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("words")
    with pytest.raises(InputError, match="both called 'same'"):
        read_texts((str(tmp_path / "a/same.txt"), str(tmp_path / "b/same.txt")))
