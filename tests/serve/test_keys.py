"""API keys: the file, the comparison, the limits, and how requests are refused by them."""

import hmac
import io
import stat
import threading

import httpx
import pytest

from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.serve.errors import ApiError
from llmlite.serve.keys import Keyring, StoredKey, new_key, read_keys
from llmlite.serve.limits import Bucket, Caller, Limits
from tests.serve.conftest import error_of, running
from tests.serve.scripted_engine import ScriptedEngine

GOOD, OTHER = "a-key-of-some-length-0001", "a-key-of-some-length-0002"
CHAT = {"model": "model", "messages": [{"role": "user", "content": "say:ab"}]}


def ring(*keys, **limits):
    return Keyring([StoredKey.of(f"key{index}", key, Limits(**limits)) for index, key in enumerate(keys)])


def ask(server, key=GOOD, header="Authorization", **body):
    value = f"Bearer {key}" if header == "Authorization" else key
    return server.post("/v1/chat/completions", {**CHAT, **body}, headers={header: value})


def test_a_key_is_shown_once_and_its_hash_is_kept(tmp_path, capsys):
    file = tmp_path / "keys"
    assert main(["key", "alice", "-o", str(file), "--requests-per-minute", "60", "--concurrent", "2"]) == 0
    key, shown_on_stderr = capsys.readouterr()
    key = key.strip()
    assert "once" in shown_on_stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text()
    assert main(["key", "bob", "-o", str(file)]) == 0
    assert capsys.readouterr().out.strip() != key
    assert main(["key", "alice", "-o", str(file)]) == 2
    assert "already" in capsys.readouterr().err
    found = Keyring.read(file)
    assert len(found) == 2
    assert found.find([key]).name == "alice"
    assert found.find([key]).limits == Limits(requests_per_minute=60, concurrent=2)


def test_a_key_that_is_there_can_be_hashed(tmp_path, capsys, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\n")
    for given, status in [(GOOD, 0), ("short", 2), ("with a space in the middle of it", 2), ("", 2)]:
        monkeypatch.setattr("sys.stdin", io.StringIO(given + "\n"))
        assert main(["key", "carol", "-o", str(file), "--from-stdin"]) == status
        assert GOOD not in "".join(capsys.readouterr())
    assert Keyring.read(file).find([GOOD]).name == "carol"


LINE = str(StoredKey.of("alice", GOOD, Limits()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no API key"),
        ("# nothing\n\n", "holds no API key"),
        (f"{LINE}\nsecret-in-plain-text-000000", "line 2: is not NAME:sha256"),
        (f"{LINE} requests=5", "'requests=5' is no limit; requests-per-minute=N"),
        (f"{LINE} concurrent=0", "'concurrent=0'"),
        (f"{LINE} concurrent=-1", "'concurrent=-1'"),
        (f"{LINE}\n{LINE}", "line 2: there is a key of the name 'alice' already"),
        (LINE[:-1], "line 1"),
        (LINE.replace("alice", "al/ice"), "line 1"),
    ],
)
def test_a_broken_file_is_one_sentence_without_the_key(tmp_path, text, said):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as refusal:
        read_keys(file)
    assert "plain-text-000000" not in str(refusal.value)


def test_what_is_written_is_read():
    stored = StoredKey.of("a.b@c-d", new_key(), Limits(5, 1000, 2))
    assert StoredKey.read(str(stored), "here") == stored
    assert StoredKey.of("x", GOOD, Limits()).digest != StoredKey.of("x", GOOD, Limits()).digest, "salted"


def test_every_key_is_compared_whichever_fits(monkeypatch):
    compared = []

    def spy(one, other, compare=hmac.compare_digest):
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr("llmlite.serve.keys.hmac.compare_digest", spy)
    keys = ring(GOOD, OTHER, new_key())
    for offered in (GOOD, OTHER, "wrong", "", "é\udcff"[:1]):
        compared.clear()
        keys.find([offered])
        assert len(compared) == 3
        assert len(set(compared)) == 3


def test_a_key_is_asked_for():
    with running(ScriptedEngine(), keys=ring(GOOD, OTHER)) as server:
        for key in (GOOD, OTHER):
            assert ask(server, key).status_code == 200
            assert ask(server, key, "x-api-key").status_code == 200
        for headers in [
            {},
            {"Authorization": f"Bearer {GOOD}x"},
            {"Authorization": GOOD},
            {"Authorization": "Bearer"},
            {"Authorization": f"Basic {GOOD}"},
            {"x-api-key": ""},
            {"x-api-key": f"Bearer {GOOD}"},
            {"Authorization": "Bearer \u00e9\u00ff".encode("latin-1")},
            {"Cookie": f"key={GOOD}"},
        ]:
            answer = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert "API key" in error_of(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ["/metrics", "/openapi.json", "/nowhere", "//health", "/health/"]:
            assert httpx.get(f"{server.url}{path}").status_code == 401, path
        assert httpx.get(f"{server.url}/health").status_code == 200
        both = {"Authorization": "Bearer unused", "x-api-key": GOOD}
        assert httpx.get(f"{server.url}/v1/models", headers=both).status_code == 200


def test_requests_a_minute():
    with running(ScriptedEngine(), keys=ring(GOOD, OTHER, requests_per_minute=2)) as server:
        assert [ask(server).status_code for _ in range(2)] == [200, 200]
        answer = ask(server)
        assert "2 requests a minute" in error_of(answer, 429, code="rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert ask(server, OTHER).status_code == 200, "each key has its own"
        models = httpx.get(f"{server.url}/v1/models", headers={"x-api-key": GOOD})
        assert models.status_code == 200, "only what costs something is counted"


def test_tokens_a_minute_count_prompt_and_reply_and_what_was_not_read():
    with running(ScriptedEngine(), keys=ring(GOOD, tokens_per_minute=20)) as server:
        assert ask(server).json()["usage"]["total_tokens"] == 9
        assert ask(server, stream=True).status_code == 200
        assert ask(server).status_code == 200, "2 tokens are left"
        answer = ask(server)
        assert "20 tokens a minute" in error_of(answer, 429)
        assert 1 <= int(answer.headers["retry-after"]) <= 40


def test_requests_at_a_time():
    engine = ScriptedEngine()
    with running(engine, keys=ring(GOOD, concurrent=1)) as server:
        slow = {"messages": [{"role": "user", "content": "slow say:" + "x" * 100}]}
        thread = threading.Thread(target=ask, args=(server,), kwargs=slow)
        thread.start()
        assert server.wait(lambda: engine.calls)
        assert "1 request at a time" in error_of(ask(server), 429)
        thread.join()
        assert ask(server).status_code == 200
        for bad in ({"messages": []}, {"messages": [{"role": "user", "content": "boom"}]}):
            assert ask(server, **bad).status_code in (400, 500)
        assert ask(server).status_code == 200, "what failed is no longer counted"


def test_a_bucket_fills_again():
    now = 0.0
    bucket = Bucket(60, clock=lambda: now)
    bucket.take(60)
    assert bucket.wait() == 1
    bucket.take(9)
    assert bucket.wait() == 10
    now = 9.5
    assert bucket.wait() == 1
    now = 10.0
    assert bucket.wait() == 0
    now = 10_000.0
    bucket.take(60)
    assert bucket.wait() == 1, "it holds no more than a minute's worth"


def test_a_reload_keeps_what_was_used_and_drops_who_is_gone(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{StoredKey.of('a', GOOD, Limits(1))}\n{StoredKey.of('b', OTHER, Limits())}\n")
    keys = Keyring.read(file)
    keys.find([GOOD]).admit()
    file.write_text(f"{StoredKey.of('a', GOOD, Limits(1))}\n")
    keys.reload()
    with pytest.raises(ApiError, match="1 request a minute"):
        keys.find([GOOD]).admit()
    assert keys.find([OTHER]) is None
    file.write_text(f"{StoredKey.of('a', GOOD, Limits(100))}\n")
    keys.reload()
    keys.find([GOOD]).admit()
    for broken in ("", "plain", None):
        file.write_text(broken) if broken is not None else file.unlink()
        with pytest.raises(InputError):
            keys.reload()
        assert keys.find([GOOD]).name == "a"


def test_a_refused_caller_owes_nothing():
    caller = Caller("a", Limits(concurrent=1))
    caller.admit()
    with pytest.raises(ApiError):
        caller.admit()
    caller.leave(0)
    caller.admit()
