"""OpenAI's response objects, whole and as streamed chunks."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from llmlite.serve.engines.base import Engine
from llmlite.serve.errors import as_api_error
from llmlite.serve.generation import Delta, TokenScore
from llmlite.serve.inbox import Failed, Inbox
from llmlite.serve.models import Served
from llmlite.serve.tools.calling import Calling
from llmlite.serve.tools.parser import Arguments, Begun, CallParser, Event, Text

UNLIKELY = -9999.0
"""OpenAI's least log-probability; JSON has no minus infinity."""


class Answer:
    """What both kinds of answer share: identity, model, usage. ``prompts``: the prompt length of each sequence."""

    kind: str
    chunk_kind: str

    def __init__(self, served: Served, prompts: list[int], n: int, include_usage: bool) -> None:
        self.engine = served.service.engine
        self.include_usage = include_usage
        self.choices = len(prompts)
        self._prompt_tokens = sum(prompts[::n])  # the n choices of a prompt share it
        self._n = n
        self._generated = [0] * len(prompts)
        self._reused = [0] * len(prompts)
        self._common = {
            "id": f"{'chatcmpl' if self.kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.service.fingerprint,
        }

    def note(self, index: int, delta: Delta) -> None:
        """Keep count for the usage."""
        self._generated[index] = delta.generated
        self._reused[index] = delta.reused

    def opening(self) -> list[dict[str, Any]]:
        """The streamed choices that come before any text."""
        return []

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """One delta as streamed choices."""
        raise NotImplementedError

    def choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        """All deltas of a sequence as one choice."""
        raise NotImplementedError

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """One streamed object; with include_usage each has a usage, null but for the last."""
        return {
            **self._common,
            "object": self.chunk_kind,
            "choices": choices,
            **({"usage": usage} if self.include_usage else {}),
        }

    def complete(self, deltas: list[list[Delta]]) -> dict[str, Any]:
        """The whole object."""
        choices = [self.choice(index, parts) for index, parts in enumerate(deltas)]
        return {**self._common, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens: every drawn one counts, the end token too; cached ones are those that needed no prefill."""
        generated = sum(self._generated)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._reused[:: self._n])},
        }


class ChatAnswer(Answer):
    """``calling``: the tools that may be called; calls are then read from the text, streamed as they are written."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, served: Served, prompts: list[int], include_usage: bool, logprobs: bool, calling: Calling | None = None
    ) -> None:
        super().__init__(served, prompts, len(prompts), include_usage)
        self._logprobs = logprobs
        self._parsers: list[CallParser] = []
        if calling is not None:
            names = frozenset(function.name for function in calling.functions)
            self._parsers = [CallParser(calling.format, names, calling.required) for _ in prompts]
        self._scored: list[list[TokenScore]] = [[] for _ in prompts]

    def opening(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": None if self._parsers else ""}
        return [self._piece(index, role, None, None) for index in range(self.choices)]

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Scores go with the first piece after their tokens."""
        self._scored[index] += delta.scores
        bodies = [_streamed(event) for event in self._events(index, delta)]
        if not self._parsers and delta.scores and not bodies:
            bodies = [{"content": ""}]
        pieces = [self._piece(index, body, self._take_scores(index), None) for body in bodies]
        if delta.finish:
            left = self._take_scores(index) if self._scored[index] else None
            pieces.append(self._piece(index, {}, left, self._finish(index, delta.finish)))
        return pieces

    def choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        text, calls = "", []
        for delta in deltas:
            for event in self._events(index, delta):
                match event:
                    case Text():
                        text += event.text
                    case Begun():
                        calls.append(_call(event))
                    case Arguments():
                        calls[-1]["function"]["arguments"] += event.text
        message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        finish = deltas[-1].finish
        return {
            "index": index,
            "message": {**message, "tool_calls": calls} if calls else message,
            "logprobs": self._scores([score for delta in deltas for score in delta.scores]),
            "finish_reason": None if finish is None else self._finish(index, finish),
        }

    def _events(self, index: int, delta: Delta) -> list[Event]:
        if not self._parsers:
            return [Text(delta.text)] if delta.text else []
        parser = self._parsers[index]
        return parser.push(delta.text) + (parser.finish() if delta.finish else [])

    def _finish(self, index: int, finish: str) -> str:
        called = bool(self._parsers) and self._parsers[index].complete
        return "tool_calls" if called and finish == "stop" else finish

    def _take_scores(self, index: int) -> dict[str, Any] | None:
        scores, self._scored[index] = self._scored[index], []
        return self._scores(scores)

    def _piece(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _scores(self, scores: list[TokenScore]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {
                **self._token(score.token, score.logprob or 0.0),
                "top_logprobs": [self._token(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.engine.token_bytes(token, special=True)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, UNLIKELY), "bytes": list(data)}


def _call(event: Begun) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": event.name, "arguments": ""}
    }  # fmt: skip


def _streamed(event: Event) -> dict[str, Any]:
    """An event as the delta of a chunk."""
    if isinstance(event, Text):
        return {"content": event.text}
    more = _call(event) if isinstance(event, Begun) else {"function": {"arguments": event.text}}
    return {"tool_calls": [{"index": event.index, **more}]}


class CompletionAnswer(Answer):
    """``echoes``: for each sequence its prompt, as it was given and as token ids, or None where it isn't echoed."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        served: Served,
        prompts: list[int],
        n: int,
        include_usage: bool,
        logprobs: bool,
        echoes: list[tuple[str | list[int], list[int]] | None],
    ) -> None:
        super().__init__(served, prompts, n, include_usage)
        self._logprobs = logprobs
        self._echoes = [("", []) if echo is None else prompt_text(self.engine, *echo) for echo in echoes]
        self._begun = [False] * len(prompts)

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        echoed = not self._begun[index] and bool(self._echoes[index][1])
        self._begun[index] = True
        if not (delta.text or delta.scores or delta.finish or echoed):
            return []
        return [self._choice(index, [delta], echoed)]

    def choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        return self._choice(index, deltas, echoed=True)

    def _choice(self, index: int, deltas: list[Delta], echoed: bool) -> dict[str, Any]:
        prompt, offsets = self._echoes[index]
        text = "".join(delta.text for delta in deltas)
        logprobs = None
        if self._logprobs:
            scores = [score for delta in deltas for score in delta.scores]
            places = [len(prompt) + score.offset for score in scores]
            if echoed and deltas[0].prompt_scores is not None:
                scores, places = deltas[0].prompt_scores + scores, offsets + places
            logprobs = self._scores(scores, places)
        text = prompt + text if echoed else text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": deltas[-1].finish}

    def _scores(self, scores: list[TokenScore], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [self._label(score.token) for score in scores],
            "token_logprobs": [None if score.logprob is None else max(score.logprob, UNLIKELY) for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenScore) -> dict[str, float] | None:
        """The likeliest tokens and the one that stands there, so up to one more than was asked for."""
        if score.logprob is None:
            return None
        table = [*score.top, (score.token, score.logprob)]
        return {self._label(token): max(logprob, UNLIKELY) for token, logprob in reversed(table)}

    def _label(self, token: int) -> str:
        """A token as OpenAI spells it: text, or bytes:\\xe2\\x80 where it is only part of a character."""
        data = self.engine.token_bytes(token, special=True)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_text(engine: Engine, given: str | list[int], tokens: list[int]) -> tuple[str, list[int]]:
    """The text to echo for a prompt, and the character at which each of its tokens begins.

    A BOS token that the server put in front takes no room. Tokenizers of the SentencePiece kind put a space in front
    of the first word; the offsets leave it out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [engine.token_bytes(token, special=True) for token in tokens]
    if isinstance(given, str) and not given.encode().startswith(pieces[0]):
        pieces[0] = engine.token_bytes(tokens[0], special=False)
    text, offsets = "", []
    for piece in pieces:
        offsets.append(len(text))
        text += decoder.decode(piece)
    text += decoder.decode(b"", final=True)
    if isinstance(given, str):
        shift = len(text) - len(given)
        return given, [max(0, offset - shift) for offset in offsets]
    return text, offsets


async def whole(answer: Answer, inbox: Inbox) -> dict[str, Any]:
    """Wait for everything. Raises `Failed`."""
    deltas: list[list[Delta]] = [[] for _ in range(answer.choices)]
    while (item := await inbox.next()) is not None:
        answer.note(*item)
        deltas[item[0]].append(item[1])
    return answer.complete(deltas)


async def chunks(answer: Answer, inbox: Inbox, item: tuple[int, Delta] | None) -> AsyncGenerator[dict[str, Any]]:
    """The streamed objects, from the first delta (already taken from the inbox) to the usage. Raises `Failed`."""
    for choice in answer.opening():
        yield answer.chunk([choice])
    while item is not None:
        answer.note(*item)
        for choice in answer.pieces(*item):
            yield answer.chunk([choice])
        item = await inbox.next()
    if answer.include_usage:
        yield answer.chunk([], answer.usage())


async def stream(answer: Answer, inbox: Inbox, item: tuple[int, Delta] | None) -> AsyncIterator[str]:
    """Server-sent events, from the first delta (already taken from the inbox) to [DONE].

    A failure on the way is sent as an error object; the stream then ends without [DONE].
    """
    try:
        async for chunk in chunks(answer, inbox, item):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Failed as failure:
        yield _event(as_api_error(failure.error).body())


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
