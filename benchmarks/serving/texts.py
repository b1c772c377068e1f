"""What is asked: real questions, and long prompts made of them."""

from __future__ import annotations

import json
import random
from pathlib import Path


class Texts:
    """FastChat's questions from ``folder``."""

    def __init__(self, folder: Path) -> None:
        files = [folder / f"{name}_question.jsonl" for name in ("vicuna_bench", "mt_bench")]
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        self.questions: list[str] = [json.loads(line)["turns"][0] for line in lines]

    def short(self, count: int, tokens: int, seed: int = 0, **more: object) -> list[dict]:
        """``count`` chats of one question each, greedy, of up to ``tokens`` tokens."""
        order = random.Random(seed).sample(self.questions, len(self.questions))
        return [chat(order[place % len(order)], tokens, **more) for place in range(count)]

    def long(self, words: int, seed: int) -> str:
        """About ``words`` words of questions in an order of their own."""
        order = random.Random(seed).sample(self.questions, len(self.questions))
        out: list[str] = []
        while len(out) < words:
            for question in order:
                out += question.split()
        return " ".join(out[:words])


def chat(content: str, tokens: int, **more: object) -> dict:
    """The body of a request for a greedy reply."""
    messages = [{"role": "user", "content": content}]
    return {"model": "m", "messages": messages, "temperature": 0, "max_tokens": tokens, **more}
