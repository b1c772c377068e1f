"""Perplexity and divergence against what plain transformers and torch give."""

import json
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlite.errors import InputError
from llmlite.evals.base import SideBySide
from llmlite.evals.divergence import check_tokenizers, common_vocabulary
from llmlite.evals.engines import ROWS, open_engine
from llmlite.evals.perplexity import PROTOCOLS, Places, perplexity
from llmlite.evals.score import Windows, score
from llmlite.evals.texts import Text
from tests import gguf_models
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

WORDS = Text("words", "".join(gguf_models.TEXTS) * 40)
PAPER, HALF = PROTOCOLS["paper"], PROTOCOLS["llama.cpp"]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A model whose tokenizer puts a token in front of every text."""
    return gguf_models.save_tiny("llama3", tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A model with a soft cap on its logits."""
    return gguf_models.save_tiny("gemma3-period", tmp_path_factory.mktemp("gemma3"))


def noisy(directory, out, scale=0.02):
    """The same model with its weights moved a little."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(directory).save_pretrained(out)
    return out


def plain_logits(directory, ids):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float()


def test_paper_perplexity_is_the_mean_cross_entropy_of_every_prediction(llama3):
    ids = AutoTokenizer.from_pretrained(llama3)(WORDS.text).input_ids
    windows = np.array(ids[: 3 * 200]).reshape(3, 200)
    logits = plain_logits(llama3, windows)
    targets = torch.tensor(windows[:, 1:]).reshape(-1)
    losses = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets, reduction="none").double()

    found = score(open_engine(llama3), None, WORDS, Windows(PAPER, window=200, limit=3)).perplexity

    assert found.value == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found.stderr == pytest.approx(
        math.exp(losses.mean()) * float(losses.std()) / math.sqrt(len(losses)), rel=1e-4
    )
    assert (found.tokens, found.windows) == (3 * 199, 3)


def test_llama_cpp_perplexity_starts_each_window_with_bos_and_scores_its_second_half(llama3):
    tokenizer = AutoTokenizer.from_pretrained(llama3)
    ids = tokenizer(WORDS.text).input_ids
    assert ids[0] == tokenizer.bos_token_id, "the test needs a tokenizer that adds a token"
    losses = []
    for start in range(0, 3 * 300, 300):
        window = ids[start : start + 300]
        logits = plain_logits(llama3, [[tokenizer.bos_token_id, *window[1:]]])[0]
        losses += [F.cross_entropy(logits[p], torch.tensor(window[p + 1])).item() for p in range(150, 299)]

    found = score(open_engine(llama3), None, WORDS, Windows(HALF, window=300, limit=3)).perplexity

    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert (found.tokens, found.windows) == (3 * 149, 3)


def test_the_protocols_have_the_windows_that_they_are_named_for():
    assert [(p.window, p.stride) for p in PROTOCOLS.values()] == [(512, None), (2048, None), (1024, 512)]
    ids = np.arange(10, 35)

    def cut(protocol, bos, limit):
        return [(w.tokens.tolist(), w.start, w.first) for w in protocol.windows(ids, bos, 8, None, limit)]

    assert cut(HALF, None, None) == [(list(range(s, s + 8)), s - 10, 4) for s in (10, 18, 26)]
    assert cut(HALF, 1, 2) == [([1, *range(10, 17)], 0, 4), ([1, *range(18, 25)], 8, 4)]
    assert cut(PAPER, 1, 2) == [([1, *range(10, 17)], 0, 0), (list(range(17, 25)), 8, 0)]


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 16, 8), (97, 16, 5), (32, 16, 15), (16, 16, 8), (17, 16, 1)]
)
def test_sliding_windows_score_every_token_but_the_first_once(length, window, stride):
    ids = np.arange(length) * 3
    windows = PROTOCOLS["sliding"].windows(ids, None, window, stride, None)
    scored = []
    for number, w in enumerate(windows):
        assert np.array_equal(w.tokens, ids[w.start : w.start + window])
        assert w.start == number * stride
        assert w.first >= (0 if number == 0 else window - stride - 1), "a later token has less context than promised"
        scored += w.tokens[w.first + 1 :].tolist()
    assert scored == ids[1:].tolist()
    assert Places.of(windows).index.tolist() == list(range(1, length))
    assert len(PROTOCOLS["sliding"].windows(ids, None, window, stride, 1)) == 1


def test_sliding_perplexity_is_what_the_documented_loop_gives(llama3):
    """The loop of transformers' "perplexity of fixed-length models"."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(llama3)(WORDS.text).input_ids])[:, :700]
    model = AutoModelForCausalLM.from_pretrained(llama3).eval()
    had, sums, count = 0, 0.0, 0
    for begin in range(0, ids.shape[1], 100):
        end = min(begin + 256, ids.shape[1])
        inputs, labels = ids[:, begin:end], ids[:, begin:end].clone()
        labels[:, : -(end - had)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        sums, count, had = sums + float(loss) * scored, count + scored, end
        if end == ids.shape[1]:
            break

    engine = open_engine(llama3)
    engine.tokenize = lambda text: ids[0, 1:].numpy()
    found = score(engine, None, WORDS, Windows(PROTOCOLS["sliding"], window=256, stride=100)).perplexity

    assert found.value == pytest.approx(math.exp(sums / count), rel=1e-5)
    assert found.tokens == count == 699


def test_perplexity_by_position_and_by_window_are_means_of_their_own_tokens():
    rng = np.random.default_rng(1)
    windows = HALF.windows(np.arange(3 * 40), None, 40, None, None)
    places = Places.of(windows)
    nll = rng.gamma(2.0, 1.0, len(places.index))
    found = perplexity(nll, places)
    table = nll.reshape(3, 19)  # tokens 21 .. 39 of each
    assert [b.start for b in found.by_position] == [21, 23, 25, 28, 30, 32, 35, 37]
    assert found.by_position[-1].stop == 40
    for bucket in found.by_position:
        inside = table[:, bucket.start - 21 : bucket.stop - 21]
        assert bucket.tokens == inside.size
        assert bucket.value == pytest.approx(math.exp(inside.mean()))
    assert found.by_window == pytest.approx(table.mean(1))


def test_standard_error_follows_from_the_spread_of_the_losses():
    losses = np.random.default_rng(0).gamma(2.0, 1.5, 40_000)
    places = Places.of(PAPER.windows(np.arange(201), None, 201, None, None))
    values = [perplexity(part, places).value for part in losses.reshape(200, 200)]
    assert perplexity(losses[:200], places).stderr == pytest.approx(np.std(values), rel=0.25)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_the_chunked_head_gives_the_models_own_logits(family, request):
    directory = request.getfixturevalue(family)
    engine = open_engine(directory)
    ids = engine.tokenize(WORDS.text)[: ROWS * 2 + 77]
    own = torch.log_softmax(plain_logits(directory, ids[None])[0], dim=-1)

    chunks = list(engine.log_probs(ids, 40))

    assert [start for start, _ in chunks] == [40, 40 + ROWS, 40 + 2 * ROWS]
    torch.testing.assert_close(torch.cat([rows.cpu() for _, rows in chunks]), own[40:], rtol=1e-4, atol=1e-4)


def test_an_unknown_output_head_is_refused(tmp_path):
    model = tiny_model("granite", logits_scaling=3.0)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="output head of 'granite'"):
        open_engine(tmp_path)


def test_divergence_is_what_torch_computes_from_whole_logits(llama3, tmp_path):
    other = noisy(llama3, tmp_path)
    engine, base = open_engine(other), open_engine(llama3)
    found = score(engine, SideBySide(base), WORDS, Windows(PAPER, window=250, limit=2)).divergence

    ids = np.array(AutoTokenizer.from_pretrained(llama3)(WORDS.text).input_ids[:500]).reshape(2, 250)
    p = F.log_softmax(plain_logits(llama3, ids)[:, :-1].double(), dim=-1)
    q = F.log_softmax(plain_logits(other, ids)[:, :-1].double(), dim=-1)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).flatten()
    assert found.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.stderr == pytest.approx((kl.std() / math.sqrt(len(kl))).item(), rel=1e-3)
    assert found.median_kl == pytest.approx(kl.quantile(0.5).item(), rel=1e-3)
    assert found.p99_kl == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    assert found.p95_kl == pytest.approx(kl.quantile(0.95).item(), rel=1e-3)
    assert found.p999_kl == pytest.approx(kl.quantile(0.999).item(), rel=1e-3)
    assert found.max_kl == pytest.approx(kl.max().item(), rel=1e-3)
    assert found.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    targets = torch.tensor(ids[:, 1:])[..., None]
    moved = (q.exp() - p.exp()).gather(-1, targets).flatten()
    assert found.mean_delta_p == pytest.approx(moved.mean().item(), rel=1e-3)
    assert found.rms_delta_p == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-3)
    assert found.base_perplexity == pytest.approx(math.exp(-p.gather(-1, targets).mean()), rel=1e-5)
    assert found.by_window == pytest.approx(kl.reshape(2, 249).mean(1).tolist(), rel=1e-4)
    first = found.by_position[0]
    assert first.value == pytest.approx(kl.reshape(2, 249)[:, : first.stop - 1].mean().item(), rel=1e-4)
    assert found.mean_kl > 0.01, "the models must differ for this to test anything"


def test_a_model_does_not_diverge_from_itself(llama3):
    found = score(open_engine(llama3), SideBySide(open_engine(llama3)), WORDS, Windows(HALF, limit=2)).divergence
    assert abs(found.mean_kl) < 1e-6
    assert found.max_kl < 1e-5
    assert found.same_top == 1


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_gguf_scores_like_the_checkpoint_it_was_written_from(family, request):
    pytest.importorskip("llama_cpp")
    directory = request.getfixturevalue(family)
    engine, base = open_engine(gguf_models.gguf_of(directory), context=700), open_engine(directory)
    assert engine.bos == base.bos is not None

    found = score(engine, SideBySide(base), WORDS, Windows(HALF, window=700, limit=2))  # longer than one decode
    alone = score(engine, None, WORDS, Windows(HALF, window=700, limit=2)).perplexity
    own = score(base, None, WORDS, Windows(HALF, window=700, limit=2)).perplexity

    assert found.perplexity == alone
    assert found.perplexity.value == pytest.approx(own.value, rel=2e-3)
    assert found.divergence.mean_kl < 1e-3  # llama.cpp's cache holds float16
    assert found.divergence.same_top > 0.97
    engine.close()


def test_a_padded_vocabulary_is_compared_over_the_common_ids(llama3, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama3)
    tokens = len(AutoTokenizer.from_pretrained(llama3))
    model.resize_token_embeddings(tokens)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama3).save_pretrained(tmp_path)
    cut, padded = open_engine(tmp_path), open_engine(llama3)
    assert padded.vocab_size > cut.vocab_size == tokens

    found = score(cut, SideBySide(padded), WORDS, Windows(HALF, limit=1)).divergence

    assert found.vocabulary == tokens
    assert abs(found.mean_kl) < 1e-5, "normalized over the common ids, the two are the same model"
    padded.known_tokens += 1
    with pytest.raises(InputError, match="not the model it was made from"):
        common_vocabulary(padded, cut)


def test_another_tokenizer_is_refused(llama3, tmp_path):
    save_tiny(tmp_path / "other")
    base, other = open_engine(llama3), open_engine(tmp_path / "other")
    with pytest.raises(InputError, match=f"puts token {base.bos} in front of a text, the artifact's nothing"):
        check_tokenizers(base, other, WORDS.text)
    other.bos = base.bos
    with pytest.raises(InputError, match="differently from token 0 on"):
        check_tokenizers(base, other, WORDS.text)


def test_names_of_control_tokens_in_a_text_stay_text(llama3):
    engine = open_engine(llama3)
    assert engine.bos not in engine.tokenize("a <|im_start|> b")
    assert engine.bos in engine.tokenizer("a <|im_start|> b").input_ids[1:]
    gguf = open_engine(gguf_models.gguf_of(llama3, "f16"))
    text = "".join(gguf_models.CHATS) + WORDS.text
    assert np.array_equal(gguf.tokenize(text), engine.tokenize(text))
    gguf.close()


def test_a_text_shorter_than_a_window_is_refused(llama3):
    with pytest.raises(InputError, match=r"has 9 tokens, and protocol llama.cpp needs 512 for a window"):
        score(open_engine(llama3), None, Text("short", "the quick brown"), Windows(HALF))


def test_memory_does_not_grow_with_vocabulary_times_text():
    """However long the text, the rows of one chunk of each model are alive, and the next ones being made."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Stub:
        name, vocab_size, known_tokens, bos = "stub", 300, 300, None

        def tokenize(self, text):
            return np.arange(5000) % 300

        def decode(self, tokens):
            return str(tokens)

        def log_probs(self, tokens, first):
            nonlocal most
            for start in range(first, len(tokens), ROWS):
                rows = torch.log_softmax(torch.randn(min(ROWS, len(tokens) - start), 300), dim=-1)
                alive.add(rows)
                most = max(most, len(alive))
                yield start, rows
                del rows

    found = score(Stub(), SideBySide(Stub()), WORDS, Windows(PAPER, window=1000))
    assert found.perplexity.tokens == 5 * 999
    assert most <= 4, "chunks of earlier positions are still held"


def test_predictions_that_are_not_numbers_are_refused(llama3, tmp_path):
    other = noisy(llama3, tmp_path, scale=0)
    engine = open_engine(other)
    with torch.no_grad():
        engine.head.module.weight[7] = torch.nan
    with pytest.raises(InputError, match="are not finite: broken weights"):
        score(engine, None, WORDS, Windows(HALF, limit=1))


def test_missing_tensors_are_refused(llama3, tmp_path):
    noisy(llama3, tmp_path, scale=0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(InputError, match="16 tensors of the model are not in the files"):
        open_engine(tmp_path)
