from dataclasses import dataclass, field
from typing import Literal

import pytest

from llmlite.errors import InputError
from llmlite.options import Parser, add_options, settings_from


@dataclass(frozen=True)
class Settings:
    to: str = field(metadata={"help": "where to"})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "which"})
    many: tuple[str, ...] = field(default=(), metadata={"help": "several"})
    count: int = field(default=3, metadata={"help": "how many"})
    share: float | None = field(default=None, metadata={"help": "how much"})
    fast: bool = field(default=False, metadata={"help": "hurry"})
    no_rest: bool = field(default=False, metadata={"help": "go on"})


def parse(tmp_path, words: list[str], recipe: str | None = None) -> Settings:
    parser = Parser(prog="x")
    add_options(parser, Settings)
    file = None
    if recipe is not None:
        file = tmp_path / "r.yaml"
        file.write_text(recipe)
    return settings_from(Settings, parser.parse_args(words), file)


def test_options_follow_the_dataclass(tmp_path):
    assert parse(tmp_path, ["--to", "x"]) == Settings("x")
    words = ["--to", "x", "--kind", "b", "--many", "1", "2", "--count", "5", "--share", "0.5", "--fast"]
    assert parse(tmp_path, words) == Settings("x", "b", ("1", "2"), 5, 0.5, True)


def test_an_option_that_only_says_no_has_no_opposite(tmp_path):
    assert parse(tmp_path, ["--to", "x", "--no-rest"]).no_rest is True
    assert parse(tmp_path, [], "to: x\nno-rest: true\n").no_rest is True
    with pytest.raises(InputError, match="--no-no-rest"):
        parse(tmp_path, ["--to", "x", "--no-no-rest"])


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = "to: r\ncount: 7\nmany: [p, q]\nshare: 1\nfast: true\n"
    assert parse(tmp_path, [], recipe) == Settings("r", "a", ("p", "q"), 7, 1.0, True)
    assert parse(tmp_path, ["--count", "8", "--no-fast"], recipe).count == 8
    assert parse(tmp_path, ["--no-fast"], recipe).fast is False


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("to: r\ncuont: 7", "did you mean count"),
        ("to: r\ncount: many", "not a value of type int"),
        ("to: r\ncount: true", "not a value of type int"),
        ("to: r\nkind: c", "not one of a, b"),
        ("- to", "key: value"),
        ("to: [", "not YAML"),
        ("count: 3", "--to is missing"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, recipe, said):
    with pytest.raises(InputError, match=said):
        parse(tmp_path, [], recipe)
