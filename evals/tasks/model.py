"""lm-evaluation-harness's idea of a model, over a `Reader`: the same token ids and cuts as its own ``hf`` model.

Imports lm_eval, so it is imported where tasks are run and nowhere else.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmlite.errors import InputError
from llmlite.evals.chat import chat_template, render_chat
from llmlite.evals.generate import Reader, greedy, predict_each, score_answer
from llmlite.progress import track

ANSWER_TOKENS = 256  # of a generated answer where the task names no other number: the harness's own default


class HarnessModel(TemplateLM):
    """What the harness asks of a model. Answers are greedy; a task that samples is refused.

    Requests are answered in the order of their token ids, so that those which share a beginning follow each other
    and share what was computed for it.
    """

    backend = "causal"

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader
        self.max_length = reader.longest
        self.bos = reader.engine.bos
        self._bos_text = self._name(reader.engine.bos)

    @property
    def eot_token_id(self) -> int:
        return self.reader.eot

    @property
    def prefix_token_id(self) -> int:
        return self.reader.start

    @property
    def tokenizer_name(self) -> str:
        return self.reader.engine.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids with the beginning-of-text token in front where the tokenizer puts one and the text has none."""
        ids = self.reader.encode(string).tolist()
        if self.bos is None or add_special_tokens is False:
            return ids
        if add_special_tokens is None and string.startswith(self._bos_text):
            return ids
        return [self.bos, *ids]

    def _name(self, token: int | None) -> str:
        return "" if token is None else self.reader.name(token)

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids): the continuation's log-probability, and if it is greedy."""
        asked = []
        for _texts, context, continuation in requests:
            if not continuation:
                raise InputError("a task has an empty answer among its choices: it has no probability")
            tokens = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int64)
            asked.append((tokens[:-1], min(len(continuation), len(tokens) - 1)))
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for n, found in track(predict_each(self.reader, asked), "scoring answers", len(requests)):
            out[n] = score_answer(found, np.asarray(requests[n][2])[-len(found) :])
        return out

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        out = []
        for request in track(requests, "scoring texts", len(requests)):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            out.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return out

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        asked = []
        for request in requests:
            text, given = request.args
            wanted = normalize_gen_kwargs(given, ANSWER_TOKENS)
            if wanted.get("do_sample") or wanted.get("temperature"):
                raise InputError(f"task {request.task_name}: asks for sampled answers; only greedy ones are made here")
            if wanted.get("num_beams", 1) != 1:
                raise InputError(f"task {request.task_name}: asks for beam search; only greedy answers are made here")
            limit = wanted["max_gen_toks"]
            if limit >= self.max_length:
                raise InputError(
                    f"task {request.task_name}: wants answers of {limit:,} tokens, the model holds {self.max_length:,}"
                )
            stop = handle_stop_sequences(wanted.get("until"), eos=self.reader.name(self.eot_token_id))
            asked.append((self.tok_encode(text)[-(self.max_length - limit) :], limit, stop))
        out = [""] * len(asked)
        for n in track(sorted(range(len(asked)), key=lambda n: asked[n][0]), "writing answers", len(asked)):
            out[n] = greedy(self.reader, np.asarray(asked[n][0]), *asked[n][1:])
        return out

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render_chat(self.reader.engine, chat_history, answer=add_generation_prompt)

    def chat_template(self, chat_template_name: bool | str = False) -> str | None:
        return chat_template(self.reader.engine) if chat_template_name else None


def quiet() -> None:
    """Keep the harness's log and the data library's bars off the terminal; errors are raised, not logged."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
