"""The engine thread: order, bounds, cancelling, neighbours, death."""

import queue
import threading
import time
from concurrent.futures import Future

import pytest

from llmlite.serve.engines.base import CHUNK
from llmlite.serve.generation import Work
from llmlite.serve.sampling import Sampling
from llmlite.serve.scheduler import EngineDead, QueueFull, Scheduler, ShuttingDown
from tests.serve.scripted_engine import ScriptedEngine


@pytest.fixture
def start():
    started = []

    def make(engine=None, max_queue=8):
        scheduler = Scheduler(engine or ScriptedEngine(), max_queue)
        scheduler.start()
        started.append(scheduler)
        return scheduler

    yield make
    for scheduler in started:
        scheduler.stop()


class Client:
    """Submits prompts and waits for what comes of them."""

    def __init__(self, scheduler, *prompts, **more):
        self.events = [queue.Queue() for _ in prompts]
        works = [
            Work(list(prompt.encode()), more.get("max_tokens", 100), Sampling(temperature=0)) for prompt in prompts
        ]
        self.tickets = scheduler.submit(works, [events.put for events in self.events])

    def result(self, index=0):
        text = ""
        while True:
            event = self.events[index].get(timeout=5)
            if isinstance(event, Exception):
                return event
            text += event.text
            if event.finish:
                return text, event.finish


def wait_for(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_runs_to_the_end_and_to_the_limit(start):
    scheduler = start()
    assert Client(scheduler, "say:hello 🦙").result() == ("hello 🦙", "stop")
    assert Client(scheduler, "say:hello", max_tokens=3).result() == ("hel", "length")
    assert Client(scheduler, "say:hello", max_tokens=5).result() == ("hello", "length")
    assert Client(scheduler, "say:hello", max_tokens=6).result() == ("hello", "stop")
    assert Client(scheduler, "say:hello", max_tokens=0).result() == ("", "length")


def test_sequences_of_all_requests_take_turns(start):
    engine = ScriptedEngine(slots=2)
    scheduler = start(engine)
    long = Client(scheduler, "slow say:" + "x" * 90)
    short = Client(scheduler, "say:short")
    assert short.result() == ("short", "stop")
    assert long.events[0].qsize() < 60, "the short one had to wait for the long one"
    assert long.result() == ("x" * 90, "stop")


def test_one_slot_serves_in_order(start):
    scheduler = start()
    order = []
    works = [Work(list(f"say:{name}".encode()), 9, Sampling(temperature=0)) for name in "abc"]
    sinks = [lambda event, name=name: order.append((name, event.text)) for name in "abc"]
    scheduler.submit(works, sinks)
    wait_for(lambda: len(order) == 6)
    assert [name for name, _ in order] == list("aabbcc")


def test_prefill_goes_in_chunks_and_reuses_whole_ones(start):
    engine = ScriptedEngine()
    scheduler = start(engine)
    prompt = "p" * 2 * CHUNK + "say:a"
    assert Client(scheduler, prompt).result() == ("a", "stop")
    assert engine.calls == [CHUNK, CHUNK, 5, 1]
    engine.calls.clear()
    assert Client(scheduler, prompt + "b").result() == ("ab", "stop")
    assert engine.calls == [6, 1, 1]
    engine.calls.clear()
    other = "p" * (CHUNK + 3) + "q" * CHUNK + "say:c"
    assert Client(scheduler, other).result() == ("c", "stop")
    assert engine.calls == [CHUNK, 8, 1]


def test_a_cancelled_sequence_is_gone_before_the_next_step(start):
    engine = ScriptedEngine()
    scheduler = start(engine)
    running = Client(scheduler, "slow say:" + "x" * 1000, max_tokens=1000)
    waiting = Client(scheduler, "say:never")
    running.events[0].get(timeout=5)
    scheduler.cancel(running.tickets + waiting.tickets)
    steps = len(engine.calls)
    wait_for(lambda: not engine.running)
    assert len(engine.calls) <= steps + 1
    assert Client(scheduler, "say:next").result() == ("next", "stop")
    assert waiting.events[0].empty()


def test_a_long_prompt_is_cancelled_between_chunks(start):
    engine = ScriptedEngine()
    scheduler = start(engine)
    client = Client(scheduler, "slow" + "x" * 100 * CHUNK)
    wait_for(lambda: engine.calls)
    scheduler.cancel(client.tickets)
    wait_for(lambda: not engine.running)
    assert len(engine.calls) < 10


def test_a_failing_request_harms_no_neighbour(start):
    engine = ScriptedEngine(slots=2)
    scheduler = start(engine)
    neighbour = Client(scheduler, "slow say:" + "x" * 20)
    failing = [Client(scheduler, "boom"), Client(scheduler, "nan")]
    assert [type(client.result()) for client in failing] == [RuntimeError, FloatingPointError]
    assert neighbour.result() == ("x" * 20, "stop")
    assert not engine.running
    assert scheduler.ping().result(5) == {"running": 0, "waiting": 0}


def test_a_broken_engine_fails_everybody_at_once_and_says_so(start):
    scheduler = start(ScriptedEngine(slots=1))
    clients = [Client(scheduler, "slow break", "say:a"), Client(scheduler, "say:b")]
    for events in [*clients[0].events, *clients[1].events]:
        assert isinstance(events.get(timeout=5), EngineDead)
    with pytest.raises(EngineDead):
        scheduler.ping().result(5)
    with pytest.raises(EngineDead):
        Client(scheduler, "say:c")


def test_an_engine_that_cannot_even_close_is_dead(start):
    engine = ScriptedEngine()
    engine.close = lambda sequence, keep: 1 / 0
    scheduler = start(engine)
    assert isinstance(Client(scheduler, "say:a").result(), EngineDead)
    with pytest.raises(EngineDead):
        scheduler.ping().result(5)


def test_the_queue_is_bounded_and_says_when_to_come_again(start):
    engine = ScriptedEngine()
    scheduler = start(engine, max_queue=2)
    running = Client(scheduler, "slow say:" + "x" * 50)
    wait_for(lambda: engine.calls)
    waiting = Client(scheduler, "say:a", "say:b")
    with pytest.raises(QueueFull) as refusal:
        Client(scheduler, "say:c")
    assert refusal.value.retry_after >= 1
    scheduler.cancel(waiting.tickets[:1])
    assert scheduler.ping().result(5) == {"running": 1, "waiting": 1}
    late = Client(scheduler, "say:c")
    assert running.result() == ("x" * 50, "stop")
    assert (waiting.result(1), late.result()) == (("b", "stop"), ("c", "stop"))


def test_the_queue_counts_the_sequences_of_the_newcomer(start):
    engine = ScriptedEngine()
    scheduler = start(engine, max_queue=2)
    many = Client(scheduler, *["slow say:" + "x" * 50] * 4)  # more than may wait, but nobody does
    wait_for(lambda: engine.calls)
    scheduler.cancel(many.tickets[2:])
    with pytest.raises(QueueFull):
        Client(scheduler, "say:a", "say:b")
    assert scheduler.ping().result(5) == {"running": 1, "waiting": 1}
    Client(scheduler, "say:a")
    assert scheduler.ping().result(5) == {"running": 1, "waiting": 2}


def test_everybody_is_refused_by_an_exception_of_their_own(start):
    scheduler = start(ScriptedEngine())
    scheduler.drain()
    refusals = [scheduler.ping().exception(), scheduler.ping().exception()]
    for _ in range(2):
        with pytest.raises(ShuttingDown) as refused:
            Client(scheduler, "say:a")
        refusals.append(refused.value)
    assert len(set(map(id, refusals))) == 4

    broken = start(ScriptedEngine())
    both = Client(broken, "break", "say:b")
    told = [both.result(0), both.result(1)]
    assert [type(error) for error in told] == [EngineDead] * 2
    assert told[0] is not told[1]


def test_draining_finishes_requests_that_began_and_refuses_the_rest(start):
    engine = ScriptedEngine()
    scheduler = start(engine)
    begun = Client(scheduler, "slow say:" + "x" * 20, "say:second choice")
    waiting = Client(scheduler, "say:a")
    wait_for(lambda: engine.calls)
    scheduler.drain()
    assert isinstance(waiting.result(), ShuttingDown)
    with pytest.raises(ShuttingDown):
        Client(scheduler, "say:b")
    assert (begun.result(0), begun.result(1)) == (("x" * 20, "stop"), ("second choice", "stop"))


def test_stopping_ends_the_thread_and_tells_who_waits():
    before = threading.active_count()
    scheduler = Scheduler(ScriptedEngine(), 8)
    scheduler.start()
    client = Client(scheduler, "slow say:" + "x" * 1000, max_tokens=1000)
    client.events[0].get(timeout=5)
    scheduler.stop()
    assert isinstance(client.result(), ShuttingDown)
    assert threading.active_count() == before


def test_pings_are_answered_while_a_sequence_runs(start):
    engine = ScriptedEngine()
    scheduler = start(engine)
    Client(scheduler, "slow say:" + "x" * 1000, max_tokens=1000)
    wait_for(lambda: engine.calls)
    answer: Future = scheduler.ping()
    assert answer.result(1) == {"running": 1, "waiting": 0}
