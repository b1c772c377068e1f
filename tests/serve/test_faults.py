"""What breaks on the way: an owner, a cache, a file, a disk. The rest goes on."""

import gc
import queue
import threading

import numpy as np
import pytest

from llmlite.serve.engines.base import NoRoom
from llmlite.serve.generation import Work
from llmlite.serve.prefixes import PrefixStore
from llmlite.serve.sampling import Sampling
from llmlite.serve.scheduler import Scheduler, SchedulerSettings
from llmlite.serve.tickets import Ticket
from tests.serve.scripted_engine import ScriptedEngine

GREEDY = Sampling(temperature=0)


@pytest.fixture
def start():
    started = []

    def make(engine, **more):
        scheduler = Scheduler(engine, SchedulerSettings(**more))
        scheduler.start()
        started.append(scheduler)
        return scheduler

    yield make
    for scheduler in started:
        scheduler.stop()


def submit(scheduler, prompt, max_tokens=400, adapter=None):
    """The queue of what a prompt's sequence says, and its ticket."""
    events = queue.Queue()
    (ticket,) = scheduler.submit([Work(list(prompt.encode()), max_tokens, GREEDY, adapter=adapter)], [events.put])
    return events, ticket


def result(events):
    text = ""
    while not isinstance(event := events.get(timeout=10), Exception):
        text += event.text
        if event.finish:
            return text
    return event


@pytest.mark.parametrize("when", ["first", "last", "error"])
def test_an_owner_who_cannot_take_it_harms_nobody(start, when):
    scheduler = start(ScriptedEngine(slots=2))
    seen = []

    def sink(event):
        seen.append(event)
        last = isinstance(event, Exception) or event.finish
        if last or when == "first":
            raise ValueError("the owner is gone")

    prompt = "boom" if when == "error" else "say:abc"
    scheduler.submit([Work(list(prompt.encode()), 9, GREEDY)], [sink])
    events, _ = submit(scheduler, "say:" + "x" * 50)
    assert result(events) == "x" * 50
    assert seen and not scheduler.dead
    assert scheduler.ping().result(5) == {"running": 0, "waiting": 0}


def test_a_sequence_that_can_never_come_back_is_told_so(start):
    class Engine(ScriptedEngine):
        def load_slot(self, slot, state):
            raise NoRoom("the cache is in pieces")

    scheduler = start(Engine(context=500, slots=2, cells=500))
    first, _ = submit(scheduler, "say:" + "a" * 200)
    second, _ = submit(scheduler, "say:" + "b" * 200)
    assert result(first) == "a" * 200
    assert isinstance(result(second), NoRoom)
    third, _ = submit(scheduler, "say:c")
    assert result(third) == "c"


def test_a_full_cache_harms_no_sequence_of_another_adapter(start):
    """The one that has to leave may stand in a later group of the same step."""
    scheduler = start(ScriptedEngine(context=500, slots=2, cells=500))
    first, _ = submit(scheduler, "say:" + "a" * 200, adapter="a")
    second, _ = submit(scheduler, "say:" + "b" * 200, adapter="b")
    assert (result(first), result(second)) == ("a" * 200, "b" * 200)
    assert scheduler.stats.preemptions


def test_sequences_of_one_adapter_share_a_step_wherever_they_stand(start):
    engine = ScriptedEngine(slots=4)
    scheduler = start(engine)
    found = [submit(scheduler, "slow say:" + "x" * 20, adapter=adapter)[0] for adapter in ("a", "b", "a", "b")]
    assert [result(events) for events in found] == ["x" * 20] * 4
    assert [1, 1] in engine.steps


def test_nothing_is_left_of_thousands_of_requests(start):
    """All with the same beginning, each in part computed by the one before it."""
    scheduler = start(ScriptedEngine(slots=2), max_queue=5000)
    gc.collect()
    before = sum(isinstance(thing, Ticket) for thing in gc.get_objects())
    found = [submit(scheduler, "p" * 600 + f"{number} say:a")[0] for number in range(300)]
    keeper = submit(scheduler, "p" * 600 + "slow say:" + "x" * 100)
    assert all(result(events) == "a" for events in found)
    gc.collect()
    assert sum(isinstance(thing, Ticket) for thing in gc.get_objects()) - before <= 3
    scheduler.cancel([keeper[1]])


def test_a_slot_stays_free_when_what_should_go_into_it_cannot_be_read():
    engine = ScriptedEngine(slots=1)
    sequence = engine.open(list(range(100)))
    sequence.tokens = list(range(100))
    engine.held[0] = list(range(100))
    engine.close(sequence, keep=True)
    engine.open([200] * 50)
    engine.pool.close(next(iter(engine.running)), keep=False)
    engine.store.take = lambda match: (_ for _ in ()).throw(PermissionError("no"))
    with pytest.raises(PermissionError):
        engine.open([*range(100), 7])
    assert engine.open([1, 2, 3]).slot == 0


def ids(first, count=200):
    return np.full(count, first, np.int32)


def test_a_disk_that_is_full_does_not_fill_the_memory(tmp_path, monkeypatch):
    store = PrefixStore("f", 500, tmp_path, 10**6)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for first in range(20):
        store.put(ids(first), None, b"s" * 200)
    store.close()
    assert store.sizes() == (400, 0)


def test_a_slow_disk_does_not_fill_the_memory(tmp_path, monkeypatch):
    blocked = threading.Event()
    monkeypatch.setattr("os.replace", lambda *_: blocked.wait(10))
    store = PrefixStore("f", 500, tmp_path, 10**6)
    for first in range(200):
        store.put(ids(first), None, b"s" * 200)
    memory, _ = store.sizes()
    blocked.set()
    store.close()
    assert memory <= 500 + 18 * 200


@pytest.mark.parametrize(
    "harm", [(b'"tokens": 200', b'"tokens": "20'), (b'"sha256"', b'"sha257"'), (b": 200", b": -20")]
)
def test_a_header_that_makes_no_sense_is_no_prefix(tmp_path, harm):
    store = PrefixStore("f", 500, tmp_path, 10**6)
    store.put(ids(5), None, b"s" * 200)
    store.close()
    (file,) = tmp_path.iterdir()
    assert harm[0] in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(*harm))
    again = PrefixStore("f", 500, tmp_path, 10**6)
    assert again.find(ids(5, 300), None) is None
    again.close()


def test_two_servers_share_a_folder(tmp_path):
    """Either may remove a file that the other one knows, and neither what the other one is writing."""
    one = PrefixStore("f", 0, tmp_path, 10**6)
    one.put(ids(5), None, b"s" * 200)
    one.close()
    (tmp_path / "0.1.partial").write_bytes(b"half")
    two = PrefixStore("f", 0, tmp_path, 10**6)
    assert (tmp_path / "0.1.partial").exists()
    match = two.find(ids(5, 300), None)
    one._forget(one.find(ids(5, 300), None).prefix)
    assert two.take(match) is None and two.find(ids(5, 300), None) is None
    assert two.hits == 0
    two.close()


def test_the_folder_keeps_to_its_limit_when_the_model_changes(tmp_path):
    for fingerprint in "abcdef":
        store = PrefixStore(fingerprint, 10**6, tmp_path, 3000)
        for first in range(2):
            store.put(ids(first), None, b"s" * 200)
        store.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3000 + 2 * 1300
