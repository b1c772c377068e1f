"""Which of the teacher's tokens the student's are: the same ids, or a subset with the same strings."""

from __future__ import annotations

from typing import Any

import torch

from llmlite.errors import InputError

PROBE = "Don't stop 12345\n\n\tif x == 1_000:  # we'LL see\n 语言模型 🚀 naïve"


def match_vocabularies(teacher: Any, student: Any) -> torch.Tensor | None:
    """The teacher's id of each of the student's tokens, int64 [tokens]; None where every token has the same id in both.

    Both are tokenizers of transformers. `InputError` where the student has tokens that the teacher does not have: then
    their distributions are over different things.
    """
    its, mine = teacher.get_vocab(), student.get_vocab()
    if its == mine and teacher(PROBE).input_ids == student(PROBE).input_ids:
        return None
    if its == mine:
        raise InputError(
            "the teacher's and the student's tokenizers have the same tokens and cut text differently; a student with "
            "the teacher's own tokenizer is right"
        )
    missing = [token for token in mine if token not in its]
    if missing:
        raise InputError(
            f"{len(missing):,} of the student's {len(mine):,} tokens, as {missing[0]!r}, are none of the teacher's, so "
            "their predictions can't be compared; a student with the teacher's tokenizer, or a part of it, is right"
        )
    by_id = {number: token for token, number in mine.items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise InputError("the student's tokenizer skips token ids, so its tokens can't be matched with the teacher's")
    return torch.tensor([its[by_id[number]] for number in range(len(by_id))])
