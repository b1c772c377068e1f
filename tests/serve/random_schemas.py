"""Random JSON schemas, and an engine of random logits to answer them: no model is less inclined to write JSON."""

import numpy as np

from tests.serve.scripted_engine import ScriptedEngine

WORDS = ("name", "age", "tags", "é", "a b", 'quo"te', "id", "x_1", "kind")
PATTERNS = ("^[a-z]{2,5}$", "^\\d{3}-\\d{4}$", "[A-Z]", "^(red|green)+$", "^é?x*$")
PIECES = (
    '": ',
    '", "',
    '"}',
    "{}",
    "[]",
    "tru",
    "e,",
    ' "',
    "1.5",
    "00",
    '"a',
    "null",
    "é",
    "🦙",
    "\\u",
    '\\"',
    "]}",
    "lse",
    "-1",
    "e+",
)


def random_schema(random, depth=0):
    """One schema; nested up to three deep."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["object", "array", "anyOf", "object", "tuple"] if depth < 3 else []
    kind = random.choice(kinds if depth else ["object", "object", "array", "anyOf"])
    make = {"string": _string, "integer": _integer, "number": _number, "enum": _enum}.get(kind)
    if make is not None:
        return make(random)
    if kind == "const":
        return {"const": random.choice([1, -2.5, "x\n", None, [1, {"a": True}], {}])}
    if kind == "object":
        return _object(random, depth)
    if kind == "array":
        low = random.randrange(3)
        more = {"minItems": low, "maxItems": low + random.randrange(3)} if random.random() < 0.8 else {}
        return {"type": "array", "items": random_schema(random, depth + 1), **more}
    if kind == "tuple":
        places = [random_schema(random, depth + 1) for _ in range(2)]
        return {"type": "array", "prefixItems": places, "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(random, depth + 1) for _ in range(random.randint(2, 3))]}
    return {"type": kind}


def _string(random):
    form = random.randrange(4)
    if form == 0:
        return {"type": "string", "pattern": random.choice(PATTERNS)}
    if form == 1:
        low = random.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + random.randrange(6)}
    return {"type": "string"} if form == 2 else {"type": "string", "format": random.choice(["date", "uuid", "ipv4"])}


def _integer(random):
    low = random.randint(-1000, 1000)
    bounds = {"minimum": low, "exclusiveMaximum": low + random.randint(2, 5000)} if random.random() < 0.7 else {}
    return {"type": "integer", **bounds}


def _number(random):
    low = round(random.uniform(-100, 100), 2)
    bounds = {"exclusiveMinimum": low, "maximum": low + 7.25} if random.random() < 0.7 else {}
    return {"type": "number", **bounds}


def _enum(random):
    return {"enum": random.sample(["red", "a\\b", 'q"', 1, 2.5, None, True, "é", ""], 3)}


def _object(random, depth):
    names = random.sample(WORDS, random.randint(1, 4))
    schema = {
        "type": "object",
        "properties": {name: random_schema(random, depth + 1) for name in names},
        "required": [name for name in names if random.random() < 0.6],
    }
    if random.random() < 0.2:
        schema["additionalProperties"] = random.choice([True, {"type": "integer"}])
    return schema


class RandomEngine(ScriptedEngine):
    """Tokens are bytes, a few pieces of JSON and four control tokens; each step's logits are drawn anew.

    ``closing`` is added to those of quotes and closing brackets, so that some answers end.
    """

    def __init__(self, seed=0, closing=0.0, **more):
        super().__init__(**more)
        self.vocab_size = 260 + len(PIECES)
        self.random = np.random.default_rng(seed)
        self.bonus = np.zeros(self.vocab_size, np.float32)
        self.bonus[[ord(character) for character in '"}]'] + sorted(self.eos)] = closing

    def token_bytes(self, token, special):
        return PIECES[token - 260].encode() if token >= 260 else super().token_bytes(token, special)

    def _row(self, sequence):
        return self.random.standard_normal(self.vocab_size).astype(np.float32) * 3 + self.bonus
