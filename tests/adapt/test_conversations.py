"""Chats as rows of tokens: where the answers are, what is left out, and what lies in one row."""

import json
from pathlib import Path

import pytest
import torch

from llmlite.adapt.conversations import (
    IGNORED,
    Tokens,
    batch,
    conversation_tokens,
    held_out,
    packed_rows,
    tokenized,
)
from llmlite.calibrate.corpus import read_corpus
from llmlite.errors import InputError
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FORGETFUL = (  # as Qwen3's does: what was thought stands in the last answer only
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def corpora(folder: Path, *records: object):
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [read_corpus(str(file))]


def counted(tokens: Tokens, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode([i for i, counts in zip(tokens.ids, tokens.counts, strict=True) if counts])


def test_the_answers_count_with_the_marks_that_end_them():
    system = [{"role": "system", "content": "be brief"}]
    found = conversation_tokens(system + chat("the cat", " sat on", "and the dog", "ran\nto the house "), TOKENIZER)
    assert counted(found) == " sat on<|im_end|>ran\nto the house <|im_end|>"
    text = TOKENIZER.apply_chat_template(
        system + chat("the cat", " sat on", "and the dog", "ran\nto the house "), tokenize=False
    )
    assert TOKENIZER.decode(found.ids) == text


def test_a_greeting_that_opens_a_chat_does_not_count(tmp_path: Path):
    greeting = {"role": "assistant", "content": "the house"}
    found = conversation_tokens([greeting, *chat("the cat", "sat")], TOKENIZER)
    assert counted(found) == "sat<|im_end|>"
    _, counts = tokenized(corpora(tmp_path, {"messages": [greeting]}, {"messages": chat("a", "b")}), TOKENIZER, 100)
    assert (counts.without_answer, counts.used) == (1, 1)


def test_where_a_template_rewrites_earlier_turns_the_last_answer_counts():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETFUL
    found = conversation_tokens(chat("a", "first", "b", "second"), tokenizer)
    assert counted(found, tokenizer) == "<think>\n\n</think>\n\nsecond<|im_end|>"


def test_a_template_whose_prompt_no_answer_follows_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant\n{% endif", "Answer: {% endif")
    with pytest.raises(InputError, match="does not put an answer behind the prompt"):
        conversation_tokens(chat("a", "b"), tokenizer)


def test_a_chat_that_the_template_refuses_is_one_sentence():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InputError, match=r"does not go through .*no system here"):
        conversation_tokens(chat("a", "b"), tokenizer)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": chat("the cat", "sat")}, {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]},
        {"instruction": "the cat", "input": "", "output": "sat"}, {"instruction": "the cat", "instances": [{"input": "", "output": "sat"}]},
        {"prompt": "the cat", "completion": "sat"}, {"prompt": chat("the cat"), "completion": [{"role": "assistant", "content": "sat"}]},
    ],
)  # fmt: skip
def test_records_of_every_kind(tmp_path: Path, record):
    (found,), counts = tokenized(corpora(tmp_path, record), TOKENIZER, 256)
    assert counted(found) == "sat<|im_end|>" and counts.used == 1


def test_what_cannot_be_used_is_counted_and_said(tmp_path: Path):
    long = "the dog ran to the house " * 40
    data = corpora(
        tmp_path, {"messages": chat("the cat", "sat")}, {"messages": chat("the cat", "sat")},
        {"messages": chat("empty", " \n")}, {"messages": chat("none")}, {"messages": chat(long, "too long")},
        {"messages": chat("the mat", "first", long, "second")}, {"messages": chat("the dog", "ran", "unanswered")},
    )  # fmt: skip
    found, counts = tokenized(data, TOKENIZER, 100)
    assert [counted(tokens) for tokens in found] == ["sat<|im_end|>", "first<|im_end|>", "ran<|im_end|>"]
    assert vars(counts) == {
        "given": 7, "repeated": 1, "without_answer": 2, "too_long": 1, "cut": 1, "used": 3,
    }  # fmt: skip
    assert [note.partition(" conversations ")[0] for note in counts.notes(100)] == [
        "1 of 7",
        "2 of 7",
        "1 of 7",
        "1 of 7",
    ]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([{"messages": chat("a", "")}], "no conversation to train on; 1 of 1 conversations have an empty answer"),
        (
            [{"messages": chat("the cat sat on the mat " * 90, "b")}],
            "1 of 1 conversations are longer than --length 100",
        ),
        ([{"text": "plain"}], "holds plain text"),
    ],
)
def test_data_without_anything_to_train_on_is_refused(tmp_path: Path, records, told):
    with pytest.raises(InputError, match=told):
        tokenized(corpora(tmp_path, *records), TOKENIZER, 100)


def test_without_a_chat_template_it_is_refused(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        tokenized(corpora(tmp_path, {"messages": chat("a", "b")}), tokenizer, 100)


def numbered(count: int, size: int = 6) -> list[Tokens]:
    """Conversations whose ids tell them apart, the second half of each an answer."""
    return [
        Tokens(
            tuple(range(100 * n, 100 * n + size + n % 3)), (False,) * (size // 2) + (True,) * (size - size // 2 + n % 3)
        )
        for n in range(1, count + 1)
    ]


def test_held_out_conversations_are_not_trained_on_and_follow_from_the_seed():
    conversations = numbered(20)
    trained, held = held_out(conversations, 0.2, seed=1)
    assert len(held) == 4 and sorted([*trained, *held], key=lambda c: c.ids) == conversations
    assert held_out(conversations, 0.2, seed=1)[1] == held != held_out(conversations, 0.2, seed=2)[1]


@pytest.mark.parametrize(("count", "share"), [(1, 0.1), (2, 0.99), (5, 0.0), (5, 1.0)])
def test_nothing_to_hold_out_is_refused(count, share):
    with pytest.raises(InputError, match=r"held-out|none is left to train on"):
        held_out(numbered(count), share, 0)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_every_conversation_once_and_predict_within_each(pack):
    conversations = numbered(17)
    rows = packed_rows(conversations, 20, pack)
    assert len(rows) == (8 if pack else 17) and all(len(row.ids) <= 20 for row in rows)
    assert sorted(i for row in rows for i in row.ids) == sorted(i for c in conversations for i in c.ids)
    for row in rows:
        for place, label in enumerate(row.labels):
            start = row.ids[place] % 100 == 0
            assert (row.positions[place] == 0) == start
            if label != IGNORED:
                assert label == row.ids[place] + 1 == row.ids[place + 1] and label % 100 >= 3
    assert sum(row.counted for row in rows) == sum(sum(c.counts) for c in conversations)


def test_what_fills_a_batch_up_is_a_conversation_of_its_own():
    rows = packed_rows(numbered(3), 20, False)
    ids, positions, labels = batch(rows, torch.device("cpu"))
    assert ids.shape == positions.shape == labels.shape == (3, 8)
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 5, 0, 1] and labels[2, 5:].tolist() == [IGNORED] * 3
