"""Where a prompt goes, and what of it is there already."""

import pytest

from llmlite.serve.engines.base import Piece
from tests.serve.scripted_engine import ScriptedEngine


def run(engine, prompt, adapter=None, keep=True):
    """Run a prompt through; the sequence's reused tokens and its slot."""
    sequence = engine.open(prompt, adapter)
    reused, slot = sequence.reused, sequence.slot
    engine.step([Piece(sequence, prompt[reused:], 1)])
    engine.close(sequence, keep)
    return reused, slot


def tokens(start, count):
    return [(start + place) % 250 for place in range(count)]


def test_the_slot_with_most_of_the_prompt_is_taken():
    engine = ScriptedEngine(slots=3)
    first, second = tokens(0, 100), tokens(100, 100)
    busy = engine.open([7])
    assert run(engine, second) == (0, 1)
    engine.close(busy, keep=False)
    assert run(engine, first) == (0, 0)
    assert run(engine, [*second, 1, 2]) == (100, 1)
    assert run(engine, [*first[:60], 9]) == (60, 0)


def test_what_a_slot_loses_is_kept_and_comes_back():
    engine = ScriptedEngine(slots=1)
    run(engine, tokens(0, 100))
    run(engine, tokens(100, 100))
    assert run(engine, [*tokens(0, 90), 7]) == (90, 0)
    assert run(engine, [*tokens(100, 100), 7]) == (100, 0)


def test_a_prompt_is_copied_from_a_slot_that_is_busy():
    engine = ScriptedEngine(slots=2)
    busy = engine.open(tokens(0, 100))
    engine.step([Piece(busy, tokens(0, 100), 1)])
    assert run(engine, [*tokens(0, 80), 7]) == (80, 1)
    engine.step([Piece(busy, [1], 1)])


def test_nothing_is_taken_over_from_another_adapter_or_after_an_error():
    engine = ScriptedEngine(slots=1)
    run(engine, tokens(0, 100), adapter="a")
    assert run(engine, tokens(0, 100))[0] == 0
    assert run(engine, tokens(0, 100), adapter="a")[0] == 99
    run(engine, tokens(50, 100), keep=False)
    assert run(engine, tokens(50, 100))[0] == 0


def test_the_last_token_of_a_prompt_is_always_run():
    engine = ScriptedEngine(slots=1)
    run(engine, tokens(0, 100))
    assert run(engine, tokens(0, 100))[0] == 99


def test_where_nothing_can_be_cut_only_whole_contents_are_of_use():
    engine = ScriptedEngine(slots=1, can_cut=False)
    run(engine, tokens(0, 100))
    assert run(engine, [*tokens(0, 100), 7, 8]) == (100, 0)
    assert run(engine, [*tokens(0, 50), 9])[0] == 0
    sequence = engine.open(tokens(0, 100))
    engine.step([Piece(sequence, tokens(0, 60), 0)])
    engine.checkpoint(sequence)
    engine.step([Piece(sequence, tokens(60, 40), 1)])
    engine.close(sequence, keep=True)
    assert run(engine, [*tokens(0, 60), 9]) == (60, 0)


def test_a_sequence_that_left_comes_back_as_it_was():
    engine = ScriptedEngine(slots=2)
    sequence = engine.open(tokens(0, 100))
    engine.step([Piece(sequence, tokens(0, 100), 1)])
    engine.suspend(sequence)
    assert sequence.slot is None
    run(engine, tokens(20, 50)), run(engine, tokens(30, 50))
    engine.resume(sequence)
    engine.step([Piece(sequence, [5], 1)])
    engine.close(sequence, keep=True)
    assert run(engine, [*tokens(0, 100), 5, 6])[0] == 101


@pytest.mark.parametrize("cells", [250, None])
def test_the_cache_never_holds_more_than_it_can(cells):
    engine = ScriptedEngine(slots=4, cells=cells)
    for start in range(8):
        run(engine, tokens(start * 10, 100))
        assert engine.room().used == 0
        assert engine.room().kept <= engine.room().total
