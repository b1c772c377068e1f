"""A checkpoint exported to GGUF computes and tokenizes in llama.cpp as it does in transformers."""

import pytest
from gguf_models import CHATS, CONFIGS, TEXTS, LlamaCpp, gguf_of, relative_gap, save_tiny, transformers_logits
from transformers import AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

PROMPT = [1, 200, 37, 300, 301, 77, 78, 250, 9, 12, 280, 5, 60, 199, 31, 330]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny checkpoints and their f32 GGUF files, made once."""
    made = {}

    def get(name):
        if name not in made:
            directory = save_tiny(name, tmp_path_factory.mktemp(name))
            made[name] = directory, gguf_of(directory)
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, tiny):
    directory, file = tiny(name)
    reader = LlamaCpp(file)
    wanted, found = transformers_logits(directory, PROMPT), reader.logits(PROMPT)
    first = reader.logits(PROMPT[:1])
    reader.close()
    assert relative_gap(wanted, found) < 1e-3
    assert relative_gap(wanted[:1], first) < 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_token_ids_equal_those_of_transformers(name, tiny):
    directory, file = tiny(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reader = LlamaCpp(file, vocab_only=True)
    for text in [*TEXTS, *CHATS, "x <tool_call>{}<table> "]:
        assert reader.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text
        assert reader.tokenize(text, add=True) == tokenizer(text).input_ids, text
    reader.close()
