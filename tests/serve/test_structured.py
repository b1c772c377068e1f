"""Grammars: what is allowed at each step, what is refused, and that nothing hostile gets far."""

import asyncio
import json
import random

import numpy as np
import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from llmlite.serve.sampling import Sampling, allowed, choose, generator  # noqa: E402
from llmlite.serve.structured import compiler, schema  # noqa: E402
from llmlite.serve.structured.compiler import Compiler  # noqa: E402
from llmlite.serve.structured.grammar import choice_grammar, json_grammar, regex_grammar, text_grammar  # noqa: E402
from llmlite.serve.structured.schema import InvalidGrammar  # noqa: E402
from tests.serve.random_schemas import RandomEngine, random_schema  # noqa: E402
from tests.serve.scripted_engine import CONTROL, EOS, ScriptedEngine  # noqa: E402


def constraint(grammar, engine=None, markers=()):
    made = Compiler(engine or ScriptedEngine(), markers)
    try:
        return asyncio.run(made.compile(grammar))()
    finally:
        made.close()


def follows(grammar, text):
    """Whether the text is an answer, token by token, and whether it may end there."""
    state = constraint(grammar)
    for token in text.encode():
        if not state.mask()[token]:
            return False
        state.accept(token)
    return bool(state.mask()[EOS])


def answer(state, engine, limit):
    """An answer drawn from the engine's random logits, and whether it ended."""
    data, draw = b"", generator(1, 0)
    for _ in range(limit):
        token = choose(allowed(engine._row(None), state.mask()), Sampling(), {}, draw)
        state.accept(token)
        if token in engine.eos:
            return data.decode(), True
        data += engine.token_bytes(token, special=False)
    return data.decode("utf-8", "replace"), False


def test_200_random_schemas_are_kept_by_random_logits():
    draw = random.Random(7)
    finished = 0
    engines = [RandomEngine(closing=bonus) for bonus in (0.0, 4.0, 8.0)]
    compilers = [Compiler(engine, ()) for engine in engines]

    async def states():
        schemas = [random_schema(draw) for _ in range(200)]
        return [
            (wanted, n % 3, (await compilers[n % 3].compile(json_grammar(wanted, "f", exact=True)))())
            for n, wanted in enumerate(schemas)
        ]

    for wanted, which, state in asyncio.run(states()):
        text, ended = answer(state, engines[which], 150)
        if ended:
            finished += 1
            jsonschema.Draft202012Validator(wanted).validate(json.loads(text))
        else:
            with pytest.raises(ValueError):  # it was not yet whole: an end would have been allowed, not forced
                json.loads(text + "\x00")
    assert finished > 100
    for made in compilers:
        made.close()


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["2", "13", "3.0", " 3"]),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, ["{}", '{"a": null}', '{"a":null}'], ['{"b": 1}', '{\n"a": null}']),
        ({"type": "object", "properties": {}, "additionalProperties": {"type": "boolean"}}, ['{"b": true}'], ['{"b": 1}']),
        ({"$ref": "#/$defs/list", "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}}, ["[]", "[[], [[]]]"], ["[1]"]),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "integer"}}}], "type": "object"}, ['{"a": 1, "b": 2}', '{"a": 1}'], ['{"b": 2}']),
        ({"type": "string"}, ['"é\\n\\u0001"'], ['"\n"', '"\\x"']),
    ],
)  # fmt: skip
def test_what_a_schema_allows(wanted, right, wrong):
    grammar = json_grammar(wanted, "f", exact=True)
    assert all(follows(grammar, text) for text in right)
    assert not any(follows(grammar, text) for text in wrong)


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (regex_grammar(r"\d{2}/[a-c]+", "f"), ["12/a", "99/abc"], ["1/a", "12/", "12/d", "٣٣/a"]),
        (regex_grammar("^a\nb$", "f"), ["a\nb"], ["ab"]),
        (choice_grammar(["yes", 'n"o', "é\n"], "f"), ["yes", 'n"o', "é\n"], ["ye", "no"]),
        (text_grammar('root ::= "a" item+\nitem ::= [0-9] | "(" item ")" # twice\n', "f"), ["a1", "a1(2)((3))"], ["a", "a(1", "b"]),
        (text_grammar('start: "a" b\nb: /[xy]/', "f"), ["ax"], ["az"]),
    ],
)  # fmt: skip
def test_what_other_grammars_allow(grammar, right, wrong):
    assert all(follows(grammar, text) for text in right)
    assert not any(follows(grammar, text) for text in wrong)


def test_control_tokens_fit_no_grammar_but_ends_do_where_it_may_end():
    state = constraint(regex_grammar("(.|\n)*", "f"))
    mask = state.mask()
    assert mask[EOS]
    assert not mask[[CONTROL, 258, 259]].any()
    assert not constraint(regex_grammar("a+", "f")).mask()[EOS]


def test_a_marker_stands_for_its_letters():
    state = constraint(choice_grammar([f"<{CONTROL}>x"], "f"), markers=(f"<{CONTROL}>",))
    assert list(np.flatnonzero(state.mask())) == [ord("<"), CONTROL]
    state.accept(CONTROL)
    assert list(np.flatnonzero(state.mask())) == [ord("x")]


def test_states_of_one_grammar_are_apart():
    made = Compiler(ScriptedEngine(), ())
    make = asyncio.run(made.compile(regex_grammar("ab", "f")))
    first, second = make(), make()
    first.accept(ord("a"))
    assert first.mask()[ord("b")]
    assert second.mask()[ord("a")]
    made.close()


def test_compiled_grammars_are_kept_and_only_so_many(monkeypatch):
    compiled = []
    original = Compiler._compile
    monkeypatch.setattr(Compiler, "_compile", lambda self, grammar: compiled.append(grammar) or original(self, grammar))
    made = Compiler(ScriptedEngine(), ())

    async def all_of_them():
        for n in [0, 0, *range(compiler.KEPT + 1), 0, compiler.KEPT]:
            await made.compile(regex_grammar(f"{n}", "f"))

    asyncio.run(all_of_them())
    assert len(compiled) == compiler.KEPT + 2
    assert len(made._kept) == compiler.KEPT
    made.close()


def nested(depth, wrap):
    inner = {"type": "integer"}
    for _ in range(depth):
        inner = wrap(inner)
    return inner


HOSTILE = {
    "nested more than": nested(100, lambda inner: {"items": inner}),
    "points outside": {"properties": {"a": {"$ref": "http://127.0.0.1/schema.json"}}},
    "points  outside": {"$ref": "file:///etc/passwd"},
    "does not exist": {"$ref": "#/$defs/missing"},
    "remainders": {"type": "integer", "multipleOf": 999_983},
    "at most 500": {"properties": {f"p{n}": {} for n in range(501)}},
    "characters": {"enum": ["x" * 1000] * 100},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "look-a": {"type": "string", "pattern": "^a(?=b)"},
    "format": {"type": "string", "format": "nothing-known"},
    "minProperties": {"type": "object", "minProperties": 2},
    "objekt": {"type": "objekt"},
    "greater": {"type": "integer", "minimum": 5, "maximum": 2},
    "regex": {"type": "string", "pattern": "("},
    "followed": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
}


@pytest.mark.parametrize("word", HOSTILE)
def test_a_schema_that_can_t_be_kept_is_refused_with_the_reason(word):
    with pytest.raises(InvalidGrammar) as refusal:
        constraint(json_grammar(HOSTILE[word], "the.field", exact=True))
    assert str(refusal.value).startswith("the.field: ")
    assert refusal.value.field == "the.field"
    if word != "followed":
        assert " ".join(word.split()) in str(refusal.value)
    assert len(str(refusal.value)) < 700


def test_without_strict_what_can_t_be_kept_is_left_out():
    grammar = json_grammar({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "f", exact=False)
    assert follows(grammar, "[1, 1]")
    assert not follows(grammar, "[a]")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"type": "array", "items": inner},
        lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]},
        lambda inner: {"anyOf": [inner, {"type": "null"}]},
        lambda inner: {"allOf": [inner]},
        lambda inner: {"const": [inner]},
    ],
)
def test_the_deepest_schema_that_is_taken_is_no_danger(wrap):
    constraint(json_grammar(nested(schema.MAX_DEPTH // 3, wrap), "f", exact=True)).mask()


@pytest.mark.parametrize(
    "grammar",
    [
        regex_grammar("(a{1000}){1000}", "f"),
        json_grammar({"type": "string", "minLength": 10**6}, "f", exact=True),
        json_grammar({"type": "array", "items": {}, "minItems": 10**9}, "f", exact=True),
        json_grammar({"enum": [f"value {n}" for n in range(3000)]}, "f", exact=True),
        json_grammar({"properties": {f"p{n}": {"type": "string"} for n in range(500)}}, "f", exact=True),
        text_grammar("start: e\ne: e e | /a/ | /b/", "f"),
    ],
)
def test_large_languages_cost_no_step_much(grammar):
    engine = RandomEngine(closing=-9.0)
    answer(constraint(grammar, engine), engine, 60)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root ::= foo", "foo"),
        ("roots ::= [a-z]", "root"),
        ("root ::= (" + "(" * 5000, "f: "),
        ('start: %json {"multipleOf": 999983}', "%json"),
        ('%llguidance {"no_forcing": false}\nstart: "a"', "%llguidance"),
        ('start: "a" b', "b"),
        ("x" * 70_000, "characters"),
    ],
)
def test_a_grammar_that_is_none_is_refused_with_the_reason(text, words):
    with pytest.raises(InvalidGrammar) as refusal:
        constraint(text_grammar(text, "f"))
    assert words in str(refusal.value)
