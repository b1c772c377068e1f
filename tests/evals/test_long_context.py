"""Questions on long contexts: what is asked, that answers are scored as they should be, and that a fault shows."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from llmlite.checkpoint.artifact import write_manifest
from llmlite.errors import InputError
from llmlite.evals.engines import open_engine
from llmlite.evals.evaluate import EvalSettings, evaluate, save_in_manifest
from llmlite.evals.generate import TransformersReader, reader_of
from llmlite.evals.kv import F32, parse_kv
from llmlite.evals.longcontext.filler import DEEDS, ENDINGS, NOUNS, PEOPLE, TIMES
from llmlite.evals.longcontext.needles import TASKS
from llmlite.evals.longcontext.paired import paired
from llmlite.evals.longcontext.run import LongContextSettings, ask, make_questions, run_long_context
from llmlite.evals.longcontext.table import long_context_table
from llmlite.evals.tasks.run import TaskMetric, TaskScore
from llmlite.evals.tasks.table import task_table
from llmlite.evals.texts import Text
from tests import gguf_models
from tests.tiny import save_tiny

LENGTH = 3000  # the tiny tokenizer has hardly a word, so facts take many tokens
SETTINGS = LongContextSettings((LENGTH,), questions=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def reader(tiny):
    engine = open_engine(tiny, threads=1)
    yield reader_of(engine)
    engine.close()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_its_answers_in_its_facts(name):
    needles = TASKS[name](np.random.default_rng(3), 4, 2.0)
    assert len(needles.questions) == 4
    for question in needles.questions:
        held = " ".join(needles.facts[n] for n in question.facts)
        assert all(word in held for word in question.expected)
        assert all(word in question.answer for word in question.expected)
        assert question.answer.startswith(" ") and not question.start.endswith(" ")
    assert len({question.prompt for question in needles.questions}) == 4
    if name == "multi_key":
        assert len(needles.facts) == 8
    again = TASKS[name](np.random.default_rng(3), 4, 2.0)
    assert needles == again != TASKS[name](np.random.default_rng(4), 4, 2.0)


def test_frequent_words_are_the_most_frequent():
    needles = TASKS["common_words"](np.random.default_rng(0), 5, 1.0)
    for question in needles.questions:
        words = [word.strip(".") for word in needles.facts[question.facts[0]].split() if word.strip(".").isalpha()][1:]
        ranked = sorted(set(words), key=words.count, reverse=True)
        assert set(ranked[:3]) == set(question.expected) and words.count(ranked[3]) < words.count(ranked[2])


def test_keys_are_no_words_of_the_filler():
    filler = " ".join([*PEOPLE, *DEEDS, *TIMES, *ENDINGS]).lower().split()
    assert not set(NOUNS) & set(filler)
    assert len(set(NOUNS)) == len(NOUNS) >= 32


def test_contexts_are_as_long_as_asked_and_the_same_for_the_same_seed(reader):
    (context,) = make_questions(reader, SETTINGS).contexts
    longest = max(len(prompt.tail) + len(prompt.answer) for prompt in context.prompts)
    assert LENGTH - 100 < len(context.ids) + longest <= LENGTH
    text = reader.decode(context.ids.tolist())
    assert all(word in text for prompt in context.prompts for word in prompt.question.expected)
    again = make_questions(reader, SETTINGS).contexts[0]
    other = make_questions(reader, replace(SETTINGS, seed=1)).contexts[0]
    assert np.array_equal(context.ids, again.ids) and not np.array_equal(context.ids, other.ids)
    two = make_questions(reader, replace(SETTINGS, samples=2)).contexts
    assert [c.sample for c in two] == [0, 1] and not np.array_equal(two[0].ids, two[1].ids)


def test_facts_stand_at_the_depth_that_is_told(reader):
    (context,) = make_questions(reader, replace(SETTINGS, tasks=("passkey",), questions=6)).contexts
    text = reader.decode(context.ids.tolist())
    assert len({round(prompt.depth, 1) for prompt in context.prompts}) > 3
    for prompt in context.prompts:
        before = len(reader.engine.tokenize(text.partition(prompt.question.expected[0])[0]))
        assert before / len(context.ids) == pytest.approx(prompt.depth, abs=0.12)


def test_a_users_text_is_what_the_facts_are_hidden_in(reader):
    own = Text("cats", "The cat sat on the mat! And the dog ran to the house? " * 200)
    asked = make_questions(reader, replace(SETTINGS, text=own))
    text = reader.decode(asked.contexts[0].ids.tolist())
    assert "The cat sat on the mat!" in text and "The baker" not in text
    assert reader.decode(asked.texts[0].tolist()).count("The cat sat on the mat!") > 20
    with pytest.raises(InputError, match="3,000 was asked for"):
        make_questions(reader, replace(SETTINGS, text=Text("short", "The cat sat.")))


def test_the_chat_template_stands_around_the_question(reader):
    prompt = make_questions(reader, SETTINGS).contexts[0].prompts[0]
    tail = reader.engine.tokenizer.decode(prompt.tail)
    assert tail.endswith(f"{prompt.question.prompt}<|im_end|>\n<|im_start|>assistant\n{prompt.question.start}")
    assert reader.decode(prompt.answer.tolist()) == prompt.question.answer


def test_answers_are_scored_as_one_pass_over_everything_scores_them(reader):
    asked = make_questions(reader, SETTINGS)
    found = ask(reader, asked)
    model = reader.engine.model
    for n in (0, 5, 9):
        prompt = asked.contexts[0].prompts[n]
        ids = np.concatenate([asked.contexts[0].ids, prompt.tail, prompt.answer])
        with torch.no_grad():
            text = torch.from_numpy(ids).to(model.device)[None]
            log_probs = torch.log_softmax(model(text).logits[0].float(), dim=-1).cpu()
            begun = text[:, : -len(prompt.answer)]
            limit = len(prompt.answer) + 8
            said = model.generate(begun, max_new_tokens=limit, do_sample=False, pad_token_id=0)[0, begun.shape[1] :]
        rows = log_probs[-len(prompt.answer) - 1 : -1]
        wanted = float(rows.gather(1, torch.from_numpy(prompt.answer)[:, None]).sum())
        answer = found.answers[n]
        assert answer.logprob == pytest.approx(wanted, rel=1e-3)
        text = reader.decode(said.tolist()).split("\n")[0]
        assert answer.match == np.mean([word in text for word in prompt.question.expected])
    assert len(found.losses[0]) == LENGTH - 1


def test_a_right_answer_matches_without_being_written(reader, monkeypatch):
    asked = make_questions(reader, replace(SETTINGS, tasks=("passkey",)))
    predict = reader.predict

    def right(tokens, rows):
        found = predict(tokens, rows)
        for prompt in asked.contexts[0].prompts:
            if rows == len(prompt.answer) and np.array_equal(
                tokens[len(asked.contexts[0].ids) :], [*prompt.tail, *prompt.answer[:-1]]
            ):
                found[torch.arange(rows), torch.from_numpy(prompt.answer)] = 0
        return found

    monkeypatch.setattr(reader, "predict", right)
    found = ask(reader, asked)
    assert [answer.match for answer in found.answers] == [1.0, 1.0]
    assert all(answer.logprob == 0 for answer in found.answers)


def test_a_broken_key_cache_shows_in_log_probabilities(reader):
    settings = replace(SETTINGS, tasks=tuple(TASKS))
    asked = make_questions(reader, settings)
    usual = ask(reader, asked).answers
    faulty = ask(TransformersReader(reader.engine, lambda k, v: (k.round().clamp(-8, 7), v)), asked).answers
    changed = np.array([one.per_token - other.per_token for one, other in zip(faulty, usual, strict=True)])
    assert np.abs(changed).mean() > 1e-3
    same = ask(TransformersReader(reader.engine, lambda k, v: (k, v)), asked).answers
    assert [a.logprob for a in same] == pytest.approx([a.logprob for a in usual], abs=1e-3)


def test_pairs_are_tested_by_flipping_signs():
    assert paired(np.ones(7), np.zeros(7)).p == 2 / 2**7
    assert paired(np.ones(5), np.ones(5)).p == 1
    assert paired(np.array([1.0, 2, 3]), np.array([0.0, 0, 6])).p == 1  # +1 +2 -3
    mixed = np.random.default_rng(0).normal(0.1, 1, 60)
    found = paired(mixed, np.zeros(60))
    normal = float(torch.special.erfc(torch.tensor(abs(found.change / found.stderr) / 2**0.5)))
    assert found.p == pytest.approx(normal, rel=0.1)
    assert found.change == pytest.approx(mixed.mean()) and found.count == 60


def test_an_evaluation_compares_with_the_usual_cache(tiny):
    settings = EvalSettings(long_context=(LENGTH,), long_context_questions=1, kv="bf16", threads=1)
    result = evaluate(tiny, settings)
    shown = json.loads(json.dumps(result.to_json()))["long_context"]
    assert shown["kv"] == "bf16:bf16" and shown["against"] == "the usual cache" and shown["text"] == "synthetic"
    assert set(shown["tasks"]) == set(TASKS)
    assert shown["all"]["questions"] == len(shown["items"]) == 5
    assert set(shown["all"]["logprob"]["change"]) == {"value", "stderr", "p"}
    parts = shown["perplexity"][str(LENGTH)]
    assert [parts[0]["first"], parts[-1]["last"]] == [1, LENGTH - 1] and len(parts) == 8
    assert parts[3]["value"] == pytest.approx(np.exp(parts[3]["nll"]))
    console = Console(width=200, record=True)
    console.print(long_context_table(result.long_context))
    text = console.export_text()
    assert "multi_key" in text and "perplexity" in text and "the usual cache" in text


def test_answers_that_are_still_valid_are_not_asked_again(tiny, tmp_path, monkeypatch):
    artifact = shutil.copytree(tiny, tmp_path / "artifact")
    write_manifest(artifact, {"kind": "artifact"})
    settings = EvalSettings(
        base=str(tiny), long_context=(LENGTH,), long_context_questions=2, long_context_tasks=("passkey", "perplexity"),
        threads=1,
    )  # fmt: skip
    first = evaluate(artifact, settings)
    save_in_manifest(artifact, first)

    class AskedError(Exception):
        pass

    def ask_again(*_):
        raise AskedError

    monkeypatch.setattr("llmlite.evals.evaluate.run_long_context", ask_again)
    again = evaluate(artifact, settings).long_context
    assert again.to_json() == json.loads(json.dumps(first.long_context.to_json()))
    assert again.figures().logprob.change == first.long_context.figures().logprob.change
    for changes in (
        {"again": True}, {"base": None}, {"kv": "bf16"}, {"long_context_seed": 1}, {"long_context_questions": 1},
        {"long_context_samples": 2}, {"long_context_tasks": ("passkey",)}, {"long_context": (LENGTH - 1,)},
    ):  # fmt: skip
        with pytest.raises(AskedError):
            evaluate(artifact, replace(settings, **changes))
    (artifact / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(AskedError):
        evaluate(artifact, settings)


def test_both_engines_answer_alike(tmp_path):
    pytest.importorskip("llama_cpp")
    checkpoint = gguf_models.save_tiny("llama", tmp_path, max_position_embeddings=4096)
    file = gguf_models.gguf_of(checkpoint, "f32")
    settings = replace(SETTINGS, questions=1, tasks=("passkey", "variable_tracking"))
    one = run_long_context(checkpoint, None, settings, threads=1)
    other = run_long_context(file, str(checkpoint), replace(settings, kv=F32), threads=1)
    assert [a.logprob for a in other.answers] == pytest.approx([a.logprob for a in one.answers], rel=1e-3)
    assert [a.logprob for a in other.theirs] == pytest.approx([a.logprob for a in one.answers], rel=1e-5)
    assert [a.match for a in other.answers] == [a.match for a in one.answers]
    assert other.against == str(checkpoint)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": (5000,)}, "trained for 4,096"),
        ({"lengths": (300,)}, "tokens are too few"),
        ({"lengths": (0,)}, "lengths is 0"),
        ({"tasks": ("paskey",)}, "is no task"),
        ({"questions": 33}, "32 at most"),
        ({"samples": 0}, "samples is 0"),
        ({"kv": parse_kv("q8_0")}, "16 wide"),
    ],
    ids=str,
)
def test_what_can_not_be_asked_is_one_sentence(tiny, changes, said):
    with pytest.raises(InputError, match=said):
        run_long_context(tiny, None, replace(SETTINGS, **changes), threads=1)


def test_tasks_are_shown_with_their_errors():
    scores = {
        "a": TaskScore(
            3, 0, True, "lm_eval 0", {"acc": TaskMetric(0.5, 0.25, (1, 0, 1)), "n": TaskMetric(2.0, None, ())}
        )
    }
    console = Console(width=120, record=True, quiet=False)
    console.print(task_table(scores))
    text = console.export_text()
    assert "0.5000 ± 0.2500" in text and "2.0000" in text and "chat template" in text
