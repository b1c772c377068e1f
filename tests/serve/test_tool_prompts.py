"""What a model is told of tools, calls and results: by its template, or in plain messages."""

import json

import pytest

pytest.importorskip("llguidance")

from llmlite.serve.engines.chat_template import render
from llmlite.serve.tools.calling import Calling, Function
from llmlite.serve.tools.formats import FORMATS, GENERIC
from llmlite.serve.tools.parser import Arguments, Begun, CallParser
from llmlite.serve.tools.prompt import conversation, without_system
from tests.tiny import tiny_tokenizer

FORMS = {form.name: form for form in (*FORMATS, GENERIC)}
ADD = Function("add", "Adds", {"type": "object", "properties": {"a": {"type": "integer"}}}, False, "tools.0.function")
CALLS = [
    {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": {"a": "é"}}} for name in "fg"
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Go"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "1", "tool_call_id": "call_f"},
    {"role": "tool", "content": "2", "tool_call_id": "call_g"},
    {"role": "user", "content": "And?"},
]
TEMPLATE = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>{% endif %}
{%- for m in messages %}[{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}]{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}
{%- endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def calling(form, many=True):
    return Calling(form, (ADD,), (ADD,), False, many)


@pytest.mark.parametrize("form", [form for form in FORMS.values() if not form.native], ids=lambda form: form.name)
def test_plain_messages_tell_of_tools_calls_and_results(form):
    told = conversation(MESSAGES, form, calling(form))
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n")
    assert json.dumps(ADD.described()) in told[0]["content"]
    assert form.trigger in told[0]["content"]
    assert [told[3]["content"].count(form.result[0]), told[3]["content"].count("2")] == [2, 1]
    parser = CallParser(form, frozenset("fg"))  # past calls are written as calls are read
    events = parser.push(told[2]["content"]) + parser.finish()
    arguments = json.dumps({"a": "é"}, ensure_ascii=False)
    assert events == [Begun(0, "f"), Arguments(0, arguments), Begun(1, "g"), Arguments(1, arguments)]


def test_past_calls_are_told_without_tools_too():
    told = conversation(MESSAGES, GENERIC, None)
    assert told[0] == MESSAGES[0]
    assert "<tool_call>" in told[2]["content"]
    assert conversation(MESSAGES[1:2], GENERIC, None) == MESSAGES[1:2]
    assert "several" not in conversation([], GENERIC, calling(GENERIC, many=False))[0]["content"]


def test_a_system_message_goes_into_the_user_s_where_the_template_refuses_it():
    folded = without_system(conversation(MESSAGES[1:2], GENERIC, calling(GENERIC)))
    assert [message["role"] for message in folded] == ["user"]
    assert folded[0]["content"].endswith("\n\nGo")
    assert without_system(MESSAGES[1:]) == MESSAGES[1:]


def test_native_templates_get_results_with_names_and_ids_as_they_want_them():
    told = conversation(MESSAGES, FORMS["hermes"], calling(FORMS["hermes"]))
    assert told[2] == MESSAGES[2]
    assert [message["name"] for message in told[3:5]] == ["f", "g"]
    short = conversation(MESSAGES, FORMS["mistral"], None)
    ids = [call["id"] for call in short[2]["tool_calls"]]
    assert [message["tool_call_id"] for message in short[3:5]] == ids
    assert all(len(identifier) == 9 and identifier.isalnum() for identifier in ids)
    assert len(set(ids)) == 2


def test_both_engines_render_tools_alike():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    told = conversation(MESSAGES, FORMS["hermes"], calling(FORMS["hermes"]))
    for tools in (calling(FORMS["hermes"]).tools(), None):
        theirs = tokenizer.apply_chat_template(told, tools=tools, add_generation_prompt=True, tokenize=False)
        ours = render(TEMPLATE, told, {"bos_token": "", "eos_token": ""}, tools)
        assert ours == theirs
        assert ("Adds" in ours) == (tools is not None)
        assert '<tool_call>{"a": "é"}' in ours
