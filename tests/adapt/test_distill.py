"""Losses between a teacher and its student, and their gradients, against the plain way of computing them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlite.adapt.distill import Distillation, Lessons, Weights, sampled
from llmlite.adapt.losses import divergence, head_sum, outcomes
from llmlite.adapt.targets import LiveTeacher, keep_on_disk, load_model
from llmlite.adapt.teacher import with_rest
from llmlite.adapt.vocabulary import match_vocabularies
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

IDS = np.random.default_rng(1).integers(0, 320, (12, 24))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return open_checkpoint(save_tiny(tmp_path_factory.mktemp("teacher") / "base", "llama"))


def lessons(teacher, folder: Path, live: bool = True, **changes) -> Lessons:
    judge = keep_on_disk(teacher, IDS[10:], folder / "held", "cpu", torch.float32)
    if live:
        source = LiveTeacher(teacher, "cpu", torch.float32, attention=True)
    else:
        source = keep_on_disk(teacher, IDS[:10], folder / "taught", "cpu", torch.float32)
    return Lessons(IDS[:10], IDS[10:], judge, source, (0, 1), **changes)


def test_divergences_by_hand():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    mix = 0.1 * p + 0.9 * q
    wanted = {
        "kl": (p * (p / q).log()).sum(),
        "reverse": (q * (q / p).log()).sum(),
        "skew": (p * (p / mix).log()).sum(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(divergence(p.log(), q.log(), name)[0], value)


@pytest.mark.parametrize("loss", ["kl", "reverse", "skew"])
def test_logits_in_pieces_have_the_gradients_of_all_at_once(loss, monkeypatch):
    monkeypatch.setattr("llmlite.adapt.losses.HELD_BYTES", 4 * 500 * 32)
    torch.manual_seed(0)
    hidden, head = torch.randn(100, 16, requires_grad=True), torch.randn(500, 16, requires_grad=True)
    ids = torch.stack([torch.randperm(500)[:20] for _ in range(100)])
    logs = with_rest(torch.log_softmax(torch.randn(100, 500), -1), ids)
    seen = []

    def measure(logits, part):
        seen.append(len(logits))
        return divergence(logs[part], outcomes(logits, ids[part]), loss).sum()

    found = head_sum(hidden, head, measure)
    wanted = divergence(logs, with_rest(torch.log_softmax(hidden @ head.T, -1), ids), loss).sum()
    assert seen == [32, 32, 32, 4]
    torch.testing.assert_close(found, wanted)
    for mine, its in zip(*(torch.autograd.grad(3 * x, [hidden, head]) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(head_sum(hidden, head, measure), wanted)


def test_the_loss_is_the_mix_it_says(teacher, tmp_path):
    given = lessons(teacher, tmp_path)
    model = tiny_model("llama", seed=5, num_hidden_layers=2)
    ids = torch.from_numpy(IDS[[0, 3]])
    whole = load_model(teacher, torch.float32)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits / 2, -1) for m in (whole, model))
        kl = (p.exp() * (p - q)).sum(-1).mean()
        own = model(ids, labels=ids).loss
    found = Distillation(model, given, Weights(temperature=2.0, data=0.25)).loss([0, 3])
    torch.testing.assert_close(found.detach(), 0.75 * 4 * kl + 0.25 * own, atol=1e-4, rtol=1e-4)


def test_logits_on_disk_stand_in_for_the_teacher(teacher, tmp_path):
    student = tiny_model("llama", seed=5)
    live = Distillation(student, lessons(teacher, tmp_path), Weights()).loss([0, 1])
    disk = Distillation(student, lessons(teacher, tmp_path, live=False), Weights()).loss([0, 1])
    assert 0.8 * live.item() < disk.item() <= live.item()  # 256 of 320 tokens by name
    again = keep_on_disk(teacher, IDS[:10], tmp_path / "taught", "cpu", torch.float32)
    assert torch.equal(
        again.read(3)[1], keep_on_disk(teacher, IDS[:10], tmp_path / "new", "cpu", torch.float32).read(3)[1]
    )


def test_the_teacher_itself_is_at_no_distance_in_any_way(teacher, tmp_path):
    model = load_model(teacher, torch.float32, attention=True)
    task = Distillation(model, lessons(teacher, tmp_path), Weights(hidden=1.0, attention=1.0))
    assert abs(float(task.loss([0, 1]))) < 1e-5
    held = task.held()
    assert held.kl < 1e-5 and held.same_top == 1.0
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(3)
    assert float(task.loss([0, 1])) > 1e-3


def test_widths_that_differ_are_projected(teacher, tmp_path):
    narrow = tiny_model("llama", hidden_size=32, head_dim=8)
    task = Distillation(narrow, lessons(teacher, tmp_path), Weights(hidden=1.0))
    names = [name for name in task.parameters() if name.startswith("projections.")]
    assert names == ["projections.1.weight"]
    task.loss([0]).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in task.parameters().values())


def test_own_words_are_sampled_and_alone_count(teacher, tmp_path):
    model = tiny_model("llama", seed=5)
    task = Distillation(model, lessons(teacher, tmp_path), Weights(on_policy=1.0))
    torch.manual_seed(0)
    ids, scored = task._own_words(torch.from_numpy(IDS[:2]))
    assert torch.equal(ids[:, :12], torch.from_numpy(IDS[:2, :12])) and not torch.equal(ids, torch.from_numpy(IDS[:2]))
    assert scored[0].tolist() == [False] * 11 + [True] * 13
    torch.manual_seed(0)
    first = task.loss([0, 1])
    torch.manual_seed(0)
    assert torch.equal(first, task.loss([0, 1]))
    sharp = tiny_model("llama", seed=5)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(1e4)  # certain of each token, so that sampling is greedy
    greedy = sharp.generate(torch.from_numpy(IDS[:2, :8]), max_new_tokens=6, do_sample=False, eos_token_id=[])
    assert torch.equal(sampled(sharp, torch.from_numpy(IDS[:2, :8]), 14), greedy)
    assert sampled(model, torch.from_numpy(IDS[:2, :8]), 24, tokens=3)[:, 8:].max() < 3  # rows without a token


def test_vocabularies():
    whole = tiny_tokenizer(vocab_size=320)
    assert match_vocabularies(whole, tiny_tokenizer(vocab_size=320)) is None
    part = tiny_tokenizer(vocab_size=265)
    found = match_vocabularies(whole, part)
    its, mine = whole.get_vocab(), part.get_vocab()
    assert all(its[token] == found[number] for token, number in mine.items()) and len(found) == len(mine)
    other = tiny_tokenizer("completely different words make other merges here " * 9)
    with pytest.raises(InputError, match=r"of the student's .* tokens, as '.*', are none of the teacher's"):
        match_vocabularies(whole, other)


def test_a_student_with_some_of_the_tokens_is_compared_over_these(teacher, tmp_path):
    some = torch.randperm(320, generator=torch.Generator().manual_seed(0))[:300]
    ids = np.random.default_rng(2).integers(0, 300, (2, 24))
    student = tiny_model("llama", seed=5, vocab_size=310)  # ten rows have no token
    whole = load_model(teacher, torch.float32)
    with torch.no_grad():
        p = torch.log_softmax(whole(some[torch.from_numpy(ids)]).logits[..., some], -1)
        q = torch.log_softmax(student(torch.from_numpy(ids)).logits[..., :300], -1)
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    live = LiveTeacher(teacher, "cpu", torch.float32, some)
    judge = keep_on_disk(teacher, ids, tmp_path / "held", "cpu", torch.float32, some)
    task = Distillation(student, Lessons(ids, ids, judge, live, (0, 1), 300), Weights())
    assert math.isclose(float(task.loss([0, 1])), wanted, rel_tol=1e-4)
    assert 0.7 * wanted < task.held().kl <= wanted
