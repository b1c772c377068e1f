"""How much of a prompt goes into a step beside sequences that generate."""

from types import SimpleNamespace

from llmlite.serve.turns import SHORT, Rates, prompt_budget

STEP = 0.025  # seconds of a step of four sequences


def arrive(rates, tokens, cost):
    """A prompt goes in slices beside four sequences; ``cost``: seconds of its next n tokens behind ``done`` others.

    The seconds of each step.
    """
    done, steps = 0, []
    while done < tokens:
        generation = SimpleNamespace(prompt_left=tokens - done, is_short=lambda short: tokens <= short)
        slice_ = min(tokens - done, prompt_budget([SimpleNamespace(generation=generation)], rates))
        seconds = STEP + cost(slice_, done)
        rates.note(seconds, 4, slice_)
        steps.append(seconds)
        done += slice_
    return steps


def begun():
    rates = Rates()
    rates.note(0.6, 0, 500)  # a prompt, alone
    for _ in range(5):
        rates.note(STEP, 4, 0)
    return rates


def test_steps_beside_a_long_prompt_stay_short_where_its_tokens_grow_dear():
    def attention(tokens, done):
        return 0.007 + tokens * (0.0013 + 0.015 * done / 6000)  # measured: far from the start, 3 cost more than a step

    steps = sorted(arrive(begun(), 6000, attention))
    assert steps[int(0.99 * len(steps))] < 3.5 * STEP
    alone = 6000 * (0.0013 + 0.015 / 2)
    assert sum(steps) < 2.5 * alone, "nor does the long prompt crawl"


def test_a_last_piece_of_one_token_does_not_make_the_next_prompt_slow():
    def dear(tokens, done):
        return 0.01 + tokens * 0.001

    rates = begun()
    before = prompt_budget([], rates)
    arrive(rates, 1, dear)
    assert prompt_budget([], rates) > 0.9 * before


def test_a_short_prompt_goes_whole():
    steps = arrive(begun(), SHORT, lambda tokens, done: tokens * 0.001)
    assert len(steps) == 1


def test_guesses_are_not_dear_because_prompts_are_cached_but_for_their_last_token():
    rates = begun()
    for _ in range(40):
        rates.note(STEP, 0, 1)
        for _ in range(20):
            rates.note(STEP, 4, 0)
    assert rates.price(0.0) < 0.3, "a guess would save a step of one sequence"
