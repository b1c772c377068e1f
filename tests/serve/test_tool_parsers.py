"""Calls read from answers as each family writes them, however the text is cut on its way."""

import json

import pytest

from llmlite.serve.tools.formats import FORMATS, GENERIC, format_of
from llmlite.serve.tools.parser import Arguments, Begun, CallParser, Text

FORMS = {form.name: form for form in (*FORMATS, GENERIC)}
NAMES = frozenset({"get_weather", "add"})
PARIS = '{"city": "Paris, \\"FR\\" } ]", "days": [1, {"a": "\\\\"}]}'

# (format, answer, text beside the calls, [(name, arguments)], whether the calls are complete)
ANSWERS = [
    (
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        "",
        [("get_weather", PARIS)],
        True,
    ),
    (
        "hermes",
        f'Let me see.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n{{"name": "add", "arguments": {{"é": "🦙"}}}}\n</tool_call>',
        "Let me see.\n\n",
        [("get_weather", PARIS), ("add", '{"é": "🦙"}')],
        True,
    ),
    ("hermes", '\n<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>\n', "", [("add", '{"a": 1}')], True),
    ("hermes", '<tool_call>\n{"name": "add"}\n</tool_call>', "", [("add", "{}")], True),
    ("hermes", "a <tool_ b <tool_call", "a <tool_ b <tool_call", [], False),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')], False),
    ("hermes", '<tool_call>\n{"nam', "", [], False),
    ("hermes", "Yes. <tool_call>\n", "Yes. ", [], False),
    ("hermes", "Yes. <tool_call> is how", "Yes. <tool_call> is how", [], False),
    ("hermes", '<tool_call>{"name": "add"}\n</tool_call>\n<tool_ca', "", [("add", "{}")], True),
    ("hermes", '<tool_call>{"name": "add"}\n</too', "", [("add", "{}")], True),
    ("hermes", '<tool_call>{"name": "add"}\n</tool_call>\n<tool_call>\n{"name": "ad', "", [("add", "{}")], True),
    ("hermes", 'x <tool_call> {"a": 1} </tool_call> y', 'x <tool_call> {"a": 1} </tool_call> y', [], False),
    ("hermes", " \n", " \n", [], False),
    ("generic", 'Yes: <tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', "Yes: ", [("add", "{}")], True),
    ("llama3", f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [("get_weather", PARIS)], True),
    ("llama3", f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}', "", [("get_weather", PARIS)], True),
    ("llama3", '{\n "name" : "add", "parameters": {}}', "", [("add", "{}")], True),
    ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', [], False),
    ("llama3", "It is sunny {here}.", "It is sunny {here}.", [], False),
    ("llama3", "<|python", "<|python", [], False),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "add", "arguments": {{}}}}]',
        "",
        [("get_weather", PARIS), ("add", "{}")],
        True,
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "a1b2c3d4e"}]',
        "",
        [("add", '{"a": 1}')],
        True,
    ),
    ("mistral", "see [1] and [TOOL", "see [1] and [TOOL", [], False),
    ("mistral-args", "Wait.[TOOL_CALLS]get_wea", "Wait.", [], False),
    ("mistral-args", "Wait.[TOOL_CALLS] means", "Wait.[TOOL_CALLS] means", [], False),
    ("mistral-args", "[TOOL_CALLS]add[ARGS]{}[TOOL_CALLS]get_weather[CALL_ID]a1", "", [("add", "{}")], True),
    (
        "mistral-args",
        f"Wait.[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{{}}",
        "Wait.",
        [("get_weather", PARIS), ("add", "{}")],
        True,
    ),
    (
        "gemma",
        f'Sure:\n```tool_code\n{{"name": "get_weather", "parameters": {PARIS}}}\n```\n```tool_code\n{{"name": "add", "parameters": {{}}}}\n```',
        "Sure:\n",
        [("get_weather", PARIS), ("add", "{}")],
        True,
    ),
    ("gemma", "```python\nprint(1)\n```", "```python\nprint(1)\n```", [], False),
]


def read(form, pieces):
    parser = CallParser(FORMS[form], NAMES)
    text, calls = "", []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.finish():
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Begun):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        else:
            assert isinstance(event, Arguments)
            assert event.index == len(calls) - 1
            calls[-1][1] += event.text
    return text, [tuple(call) for call in calls], parser.complete


@pytest.mark.parametrize(("form", "answer", "text", "calls", "complete"), ANSWERS)
def test_an_answer_in_one_piece_in_two_and_in_characters(form, answer, text, calls, complete):
    wanted = (text, calls, complete)
    assert read(form, [answer]) == wanted
    assert read(form, list(answer)) == wanted
    for cut in range(len(answer)):
        assert read(form, [answer[:cut], answer[cut:]]) == wanted, cut


def test_arguments_come_as_they_are_written():
    parser = CallParser(FORMS["hermes"], NAMES)
    assert parser.push('<tool_call>\n{"name": "add", "argum') == [Begun(0, "add")]
    assert parser.push('ents": {"a') == [Arguments(0, '{"a')]
    assert parser.push('": 1') == [Arguments(0, '": 1')]
    assert parser.push("}}") == [Arguments(0, "}")]
    assert parser.complete


def test_text_comes_as_soon_as_it_is_no_trigger():
    parser = CallParser(FORMS["hermes"], NAMES)
    assert parser.push("hello <") == [Text("hello ")]
    assert parser.push("b>") == [Text("<b>")]


def test_a_long_answer_is_read_in_time_that_grows_with_it():
    body = json.dumps({"text": "x" * 200_000})
    assert read("hermes", [f'<tool_call>\n{{"name": "add", "arguments": {body}}}\n</tool_call>'])[1] == [("add", body)]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "generic"),
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", "generic"),
        ("{% if tools %}<tools>{{ tools }}</tools> <tool_call>\n{\"name\": x, \"arguments\": y}</tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call>\n<function=f> \"arguments\"{% endif %}", "generic"),
        ("<|start_header_id|>{% if tools %}{\"name\": n, \"parameters\": p}{% endif %}", "llama3"),
        ("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS][", "mistral"),
        ("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]f[ARGS]", "mistral-args"),
        ("<start_of_turn>user\n", "gemma"),
        ("<|START_ACTION|>{{ tools }}", "generic"),
    ],
)  # fmt: skip
def test_the_template_tells_the_format(template, name):
    assert format_of(template).name == name


@pytest.mark.parametrize("answer", ["<", "<tool_cal", "<tool_call>", '<tool_call>\n{"name": "a'])
def test_where_a_call_is_required_its_beginning_is_no_text(answer):
    parser = CallParser(FORMS["hermes"], NAMES, required=True)
    assert [event for character in answer for event in parser.push(character)] + parser.finish() == []
