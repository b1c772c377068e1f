"""The chat template of a loaded model: a conversation as the text that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jinja2 import TemplateError

from llmlite.errors import InputError, first_line
from llmlite.evals.engines import Engine, LlamaCppEngine, TransformersEngine

MARK = "\u2063QUESTION\u2063"  # stands for a user's message while the template is rendered


def chat_template(engine: Engine) -> str | None:
    """The model's own template, None where it has none (a base model, as a rule)."""
    if isinstance(engine, TransformersEngine):
        own = engine.tokenizer.chat_template
        return own.get("default") if isinstance(own, dict) else own
    if isinstance(engine, LlamaCppEngine):
        raw = engine.llama.api.llama_model_chat_template(engine.llama.model, None)
        return None if raw is None else raw.decode("utf-8", "replace")
    raise TypeError(f"no chat template for {type(engine).__name__}")


def render_chat(engine: Engine, messages: list[dict[str, str]], answer: bool = True) -> str:
    """The conversation as text, the assistant's turn opened with ``answer``, else its last message left unfinished.

    `InputError` for a model without a template and for a template that refuses the messages. It runs in the
    sandbox that transformers runs templates in.
    """
    template = chat_template(engine)
    if template is None:
        raise InputError(f"this {engine.name} model has no chat template: leave the chat option out")
    turn = {"add_generation_prompt": answer, "continue_final_message": not answer}
    try:
        if isinstance(engine, TransformersEngine):
            return engine.tokenizer.apply_chat_template(messages, tokenize=False, **turn)
        return _render(engine, template)(conversations=[messages], **turn)[0][0]
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"the model's chat template refused these messages: {first_line(error)}") from None


def _render(engine: Engine, template: str) -> Callable[..., Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    assert isinstance(engine, LlamaCppEngine)
    api, llama = engine.llama.api, engine.llama
    ids = {"bos_token": api.llama_vocab_bos(llama.vocab), "eos_token": api.llama_vocab_eos(llama.vocab)}
    special: dict[str, Any] = {
        name: "" if token < 0 else llama.piece(token, special=True).decode("utf-8", "replace")
        for name, token in ids.items()
    }
    return partial(render_jinja_template, chat_template=template, **special)


def around_question(engine: Engine) -> tuple[str, str]:
    """What stands before and after a user's only message, up to where the answer begins; empty without a template."""
    if chat_template(engine) is None:
        return "", ""
    before, found, after = render_chat(engine, [{"role": "user", "content": MARK}]).partition(MARK)
    if not found:
        raise InputError("the model's chat template does not keep a user's message as it is")
    return before, after
