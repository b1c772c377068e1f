"""Settings that can't be meant, and which models come of those that can."""

from pathlib import Path

import pytest

from llmlite.errors import InputError
from llmlite.options import Parser, add_options, settings_from
from llmlite.serve import run
from llmlite.serve.engines import Opened
from llmlite.serve.settings import ServeSettings
from tests.serve.scripted_engine import ScriptedEngine


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "llmlite key NAME -o FILE"),
        ({"host": "::"}, "--insecure"),
        ({"host": "192.168.1.5"}, "--insecure"),
        ({"host": "myhost"}, "--insecure"),
        ({"tls_cert": Path("a")}, "one needs the other"),
        ({"tls_key": Path("a")}, "one needs the other"),
        ({"cors": ("a.example",)}, "is no origin"),
        ({"cors": ("https://a.example/",)}, "is no origin"),
        ({"also": ("a",)}, "NAME=PLACE is right"),
        ({"also": ("=a",)}, "NAME=PLACE is right"),
        ({"lora": ("a=",)}, "NAME=PLACE is right"),
        ({"also": ("a=x", "a=y")}, "'a' names two"),
        ({"also": ("a=x",), "lora": ("a=y",)}, "'a' names two"),
        ({"name": "a", "lora": ("a=y",)}, "'a' names two"),
        ({"kv": "q8_0:q9"}, "'q9' is no type of a cache"),
        ({"rope_scale": 2.0}, "--rope-scaling"),
        ({"rope_scaling": "yarn", "rope_scale": 0.0}, "rope_scale 0.0"),
        ({"cells": 100, "context": 200}, "at least the context, 200"),
        ({"cells": 0}, "cells 0"),
        ({"cache_ram": "much"}, "cache_ram: 'much' is not a size"),
        ({"cache_disk": "-1GB"}, "cache_disk: '-1GB' is not a size"),
        ({"cache_dir": Path(__file__)}, "is no folder"),
        ({"draft": ""}, "lookup or off"),
        ({"request_timeout": 0.0}, "request_timeout"),
        ({"request_timeout": float("nan")}, "request_timeout"),
        ({"idle_unload": -1.0}, "idle_unload"),
        ({"drain_seconds": -1.0}, "drain_seconds"),
        ({"drain_seconds": float("nan")}, "drain_seconds"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_text": 0}, "max_text"),
    ],
)
def test_refused(settings, said):
    with pytest.raises(InputError, match=said) as refusal:
        ServeSettings(**settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "127.0.0.2"}, {"host": "::1"}, {"host": "localhost"}, {"host": "0.0.0.0", "insecure": True},
        {"host": "0.0.0.0", "api_key_file": Path("keys")}, {"cors": ("*", "https://a.example:8443")},
        {"rope_scaling": "yarn", "rope_scale": 4.0}, {"cache_dir": Path("nowhere/yet")}, {"drain_seconds": 0.0},
    ],
)  # fmt: skip
def test_allowed(settings):
    ServeSettings(**settings)


def test_from_the_command_line():
    parser = Parser(prog="x")
    add_options(parser, ServeSettings)
    words = [
        "--also",
        "a=b",
        "c=d=e",
        "--lora",
        "l=f",
        "--kv",
        "q8_0:q4_0",
        "--cache-ram",
        "2GiB",
        "--exact",
        "--cors",
        "*",
    ]
    settings = settings_from(ServeSettings, parser.parse_args(words), None)
    assert settings.other_models == [("a", "b"), ("c", "d=e")]
    assert settings.adapters == [("l", Path("f"))]
    assert (str(settings.kv_types), settings.cache_ram_bytes) == ("q8_0:q4_0", 2 * 2**30)
    assert settings.exact
    assert ServeSettings().cache_ram_bytes == 0


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Artifacts that open at once; the settings with which each was opened."""
    seen = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")

    def open_artifact(artifact, settings):
        seen.append((Path(artifact).name, settings))
        return Opened(ScriptedEngine(), Path(artifact).stem, None)

    monkeypatch.setattr("llmlite.serve.engines.open_artifact", open_artifact)
    return seen


def test_several_models(opened, tmp_path):
    one, two, adapter = (str(tmp_path / f"{name}.gguf") for name in ("one", "two", "adapter"))
    settings = ServeSettings(also=(f"second={two}",), lora=(f"tuned={adapter}",), draft="small", kv="q8_0")
    specs, first = run.model_specs(one, settings)
    assert [(spec.name, spec.adapters) for spec in specs] == [("one", ("tuned",)), ("second", ())]
    assert [name for name, _ in opened] == ["one.gguf"], "the others are loaded when asked for"
    assert specs[0].open() is first
    assert specs[0].open() is not first, "opened again after its engine died"
    specs[1].open()
    name, theirs = opened[-1]
    assert (name, theirs.lora, theirs.draft, theirs.kv) == ("two.gguf", (), "off", "q8_0")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"also": ("second=/nowhere.gguf",)}, "also second: /nowhere.gguf: there is no such file"),
        ({"lora": ("tuned=/nowhere.gguf",)}, "lora tuned: /nowhere.gguf is not there"),
        ({"also": ("one=TWO",)}, "'one' names two models"),
    ],
)
def test_models_that_are_not_there(opened, tmp_path, settings, said):
    two = str(tmp_path / "two.gguf")
    settings = {name: tuple(text.replace("TWO", two) for text in given) for name, given in settings.items()}
    with pytest.raises(InputError, match=said):
        run.model_specs(str(tmp_path / "one.gguf"), ServeSettings(**settings))
