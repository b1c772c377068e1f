"""The engine thread: order, bounds, cancelling, neighbours, death."""

import queue
import threading
import time
from concurrent.futures import Future

import pytest

from llmlite.serve.engines.base import NoRoom
from llmlite.serve.generation import Work
from llmlite.serve.sampling import Sampling
from llmlite.serve.scheduler import EngineDead, QueueFull, Scheduler, SchedulerSettings, ShuttingDown, TooLate
from llmlite.serve.turns import Rates
from tests.serve.scripted_engine import ScriptedEngine


@pytest.fixture
def start():
    started = []

    def make(engine=None, max_queue=8, **more):
        scheduler = Scheduler(engine or ScriptedEngine(), SchedulerSettings(max_queue, **more))
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


def test_prefill_goes_in_chunks_and_reuses_what_is_there(start):
    engine = ScriptedEngine()
    scheduler = start(engine)
    prompt = "p" * 600 + "say:a"
    assert Client(scheduler, prompt).result() == ("a", "stop")
    assert engine.calls == [512, 93, 1]
    engine.calls.clear()
    assert Client(scheduler, prompt + "b").result() == ("ab", "stop")
    assert engine.calls == [1, 1, 1]
    engine.calls.clear()
    other = "p" * 300 + "q" * 100 + "say:c"
    assert Client(scheduler, other).result() == ("c", "stop")
    assert engine.calls == [105, 1]
    engine.calls.clear()
    assert Client(scheduler, prompt + "b").result() == ("ab", "stop"), "what the slot lost was kept elsewhere"
    assert engine.calls == [1, 1, 1]


def test_sequences_that_generate_share_a_step_and_a_long_prompt_goes_beside_them_in_slices(start):
    engine = ScriptedEngine(context=8000, slots=3)
    scheduler = start(engine)
    writing = Client(scheduler, "slow say:" + "x" * 300, "slow say:" + "y" * 300, max_tokens=1000)
    wait_for(lambda: [1, 1] in engine.steps)
    long = Client(scheduler, "p" * 6000 + "say:end")
    assert long.result() == ("end", "stop")
    beside = [step for step in engine.steps if len(step) == 3]
    assert sum(step[2] for step in beside) > 5500
    assert all(step[:2] == [1, 1] and step[2] <= 512 for step in beside)
    assert (writing.result(0), writing.result(1)) == (("x" * 300, "stop"), ("y" * 300, "stop"))


def test_a_short_prompt_overtakes_a_long_one(start):
    engine = ScriptedEngine(context=8000, slots=2)
    scheduler = start(engine)
    long = Client(scheduler, "slow" + "p" * 7000 + "say:long")
    wait_for(lambda: engine.steps)
    short = Client(scheduler, "say:short")
    assert short.result() == ("short", "stop")
    assert long.events[0].empty()
    assert long.result() == ("long", "stop")


def test_choices_of_one_prompt_compute_it_once(start):
    engine = ScriptedEngine(slots=4)
    scheduler = start(engine)
    prompt = "p" * 1000 + "say:a"
    client = Client(scheduler, *[prompt] * 4)
    assert [client.result(place) for place in range(4)] == [("a", "stop")] * 4
    assert sum(engine.calls) < 1005 + 4 * 3


@pytest.mark.parametrize("can_cut", [True, False])
def test_a_full_cache_makes_sequences_wait_and_none_fail(start, can_cut):
    """Eight sequences of up to 230 tokens each in 512 cells."""
    engine = ScriptedEngine(context=500, slots=8, cells=512, can_cut=can_cut)
    scheduler = start(engine)
    texts = [f"{letter}" * (100 + 7 * place) for place, letter in enumerate("abcdefgh")]
    client = Client(scheduler, *[f"say:{text}" for text in texts], max_tokens=400)
    assert [client.result(place) for place in range(8)] == [(text, "stop") for text in texts]
    assert scheduler.stats.preemptions > 0
    assert not engine.running


def test_the_first_of_those_that_had_to_leave_comes_back_first(start):
    engine = ScriptedEngine(context=500, slots=3, cells=512)
    scheduler = start(engine)
    order = []
    texts = ["a" * 200, "b" * 200, "c" * 200]
    works = [Work(list(f"say:{text}".encode()), 400, Sampling(temperature=0)) for text in texts]

    def sink(name):
        return lambda event: order.append(name) if event.finish else None

    scheduler.submit(works, [sink(text[0]) for text in texts])
    wait_for(lambda: len(order) == 3)
    assert order == ["a", "b", "c"]


def test_a_sequence_too_large_for_the_cache_is_told_so(start):
    engine = ScriptedEngine(context=500, slots=2, cells=64)
    scheduler = start(engine)
    small, large = Client(scheduler, "say:small"), Client(scheduler, "say:" + "x" * 100)
    assert isinstance(large.result(), NoRoom)
    assert small.result() == ("small", "stop")


def test_what_was_cancelled_while_it_had_left_the_cache_is_forgotten(start):
    engine = ScriptedEngine(context=500, slots=2, cells=500)
    scheduler = start(engine)
    client = Client(scheduler, "slow say:" + "a" * 200, "slow say:" + "b" * 200, max_tokens=400)
    wait_for(lambda: scheduler.stats.preemptions)
    scheduler.cancel(client.tickets[1:])
    assert client.result(0) == ("a" * 200, "stop")
    assert scheduler.ping().result(5) == {"running": 0, "waiting": 0}
    assert not engine.running


def test_guesses_save_steps_and_change_nothing(start, monkeypatch):
    monkeypatch.setattr(Rates, "price", lambda rates, drafting: 0.0)  # whether they pay is a matter of time
    text = "one two three four five six seven eight nine ten " * 6
    plain, guessing = ScriptedEngine(), ScriptedEngine()
    assert Client(start(plain), f"say:{text}", max_tokens=1000).result() == (text, "stop")
    scheduler = start(guessing, lookup=True)
    Client(scheduler, "x" * 100 + "say:b").result()  # how long a prompt token takes must be known first
    guessing.steps.clear()
    assert Client(scheduler, f"say:{text}", max_tokens=1000).result() == (text, "stop")
    assert any(step[0] > 1 for step in guessing.steps[1:])
    assert len(guessing.steps) < len(plain.steps) / 2
    assert Client(scheduler, f"say:{text}", max_tokens=77).result() == (text[:77], "length")


def test_one_sequence_a_step_where_replies_must_be_exact(start):
    engine = ScriptedEngine(slots=3)
    scheduler = start(engine, exact=True)
    client = Client(scheduler, "p" * 300 + "say:abc", "q" * 300 + "say:def")
    assert (client.result(0), client.result(1)) == (("abc", "stop"), ("def", "stop"))
    assert all(len(step) == 1 and step[0] <= 128 for step in engine.steps)


def test_a_request_that_takes_too_long_is_told_so(start):
    engine = ScriptedEngine()
    scheduler = start(engine, timeout=0.2)
    client = Client(scheduler, "slow say:" + "x" * 1000, "say:waits", max_tokens=1500)
    text = [client.result(0), client.result(1)]
    assert all(isinstance(event, TooLate) for event in text)
    assert not engine.running
    assert Client(scheduler, "say:next").result() == ("next", "stop")


def test_the_thread_runs_what_others_call_between_two_steps(start):
    engine = ScriptedEngine()
    scheduler = start(engine)
    Client(scheduler, "slow say:" + "x" * 1000, max_tokens=1000)
    assert scheduler.call(lambda: threading.current_thread().name).result(5) == "engine"
    assert isinstance(scheduler.call(lambda: 1 / 0).exception(5), ZeroDivisionError)
    assert scheduler.ping().result(5)["running"] == 1


def test_counts_what_it_did(start):
    scheduler = start(ScriptedEngine())
    Client(scheduler, "p" * 100 + "say:abc").result()
    Client(scheduler, "p" * 100 + "say:abd").result()
    scheduler.ping().result(5)
    stats = scheduler.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (214, 106, 8)
    assert (stats.prefix_hits, stats.running, stats.waiting) == (1, 0, 0)
    assert stats.cells_total == 2048 and stats.steps == 8
    assert stats.step_seconds >= stats.decode_seconds > 0


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
    client = Client(scheduler, "slow" + "x" * 10000)
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
    scheduler = Scheduler(ScriptedEngine(), SchedulerSettings())
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
