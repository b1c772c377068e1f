"""Tiny random models with real tokenizers, and llama.cpp as the reader of their GGUF files."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmlite.checkpoint import pretokenizers
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.evals.llama import library
from llmlite.formats.gguf.export import describe
from llmlite.formats.gguf.types import encode
from llmlite.formats.gguf.writer import GgufWriter

TEXTS = [
    "The quick brown fox jumps over the lazy dog; it's 10:45 on 2024-05-17, isn't it?",
    "语言模型可以压缩到四位,困惑度几乎不变。我想在apple工作1314151天～",
    "🚀 (normal) 😶‍🌫️ (multiple) ✅ 🦙🦙 3 33 333 3333 3.3 3...3",
    "def f(x):\n    return {'a': x[0] ** 2}  # note\n\n\n\tif x == 1_000:\n\t\tpass",
    "  leading   and trailing spaces  \n \n\n \t\t end ",
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? We'Ve a'lL",
    "",
    "a",
]
CHATS = ["<|im_start|>user\nHello 12<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "x<|im_start|> y<|im_start|>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(pre: str, add_bos: bool = False, vocab: int = 400) -> Tokenizer:
    """Byte-level BPE trained on `TEXTS` that cuts text as the named pre-tokenizer does."""
    row = pretokenizers.BY_NAME[pre]
    tokenizer = Tokenizer(models.BPE())
    spec = json.loads(tokenizer.to_str()) | pretokenizers.to_json(row)
    spec["model"]["ignore_merges"] = row.ignore_merges
    spec["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return tokenizer


@cache
def sentencepiece_tokenizer(prefix: bool) -> Tokenizer:
    """SentencePiece's BPE with byte fallback, as transformers writes Llama 2's (prefix) and Gemma's (none)."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(vocab_size=230, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].get)
    pieces = ["<unk>", *SPECIAL, *(f"<0x{n:02X}>" for n in range(256)), *words]
    vocab = {text: number for number, text in enumerate(dict.fromkeys(pieces))}
    produced = ["".join(pair) for pair in learned["merges"]]
    merges = [
        (text[:cut], text[cut:])
        for text in dict.fromkeys(produced)
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    to_mark = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_mark]) if prefix else to_mark
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", *SPECIAL)])
    tokenizer.add_tokens([AddedToken("<table>", special=False, normalized=False)])
    if not prefix:  # Gemma has runs of spaces among its added tokens
        tokenizer.add_tokens([AddedToken("▁▁▁", special=False, normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", vocab["<|im_start|>"])]
    )
    return tokenizer


SIZE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
}  # fmt: skip
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True},
    "llama3": {
        "model_type": "llama", "head_dim": 32, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": False},
    "qwen2-yarn": {
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                            "original_max_position_embeddings": 128},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6, "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
        "layer_types": GEMMA_LAYERS,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
    },
    "gemma3-period": {
        "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
        "num_hidden_layers": 7, "final_logit_softcapping": 20.0,
    },
}  # fmt: skip
TOKENIZERS = {
    "llama": lambda: byte_level_tokenizer("smollm"),
    "llama3": lambda: byte_level_tokenizer("llama-bpe", add_bos=True),
    "llama-linear": lambda: sentencepiece_tokenizer(prefix=True),
    "qwen2": lambda: byte_level_tokenizer("qwen2"),
    "qwen2-yarn": lambda: byte_level_tokenizer("qwen2"),
    "qwen3": lambda: byte_level_tokenizer("qwen2"),
    "gemma3": lambda: sentencepiece_tokenizer(prefix=False),
    "gemma3-period": lambda: sentencepiece_tokenizer(prefix=False),
}


def save_tiny(name: str, directory: Path, padding: int = 5, **size: float) -> Path:
    """A random model of `CONFIGS` with its tokenizer; ``padding`` rows of the embedding have no token.

    ``size`` replaces values of `SIZE`. Norms lie on multiples of 1/1024, so that Gemma's shift by 1 and back is
    exact.
    """
    torch.manual_seed(11)
    tokenizer = TOKENIZERS[name]()
    vocab = tokenizer.get_vocab_size() + padding
    ids = {"bos_token_id": tokenizer.token_to_id("<|im_start|>"), "eos_token_id": tokenizer.token_to_id("<|im_end|>")}
    shape = {**SIZE, **size, "vocab_size": vocab}
    config = AutoConfig.for_model(**{**shape, **ids, "pad_token_id": None, **CONFIGS[name]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if "norm" in key and "gemma" not in name else 0.0
            parameter.data = ((torch.randn_like(parameter) * 0.3 + centre) * 1024).round() / 1024
    model.save_pretrained(directory)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<unk>" if tokenizer.token_to_id("<unk>") is not None else None, chat_template=TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(directory)
    return directory


def write_dense(checkpoint: Checkpoint, path: Path, kind: str = "f32") -> Path:
    """The whole checkpoint as GGUF, matrices in one dense type."""
    model = describe(checkpoint)
    extra = model.extra()
    layout = {
        model.gguf_name(name): ("f32" if len(entry.shape) == 1 else kind, entry.shape)
        for name, entry in checkpoint.tensors.items()
    } | {name: ("f32", tuple(tensor.shape)) for name, tensor in extra.items()}
    with GgufWriter(path, model.metadata, layout) as writer:
        for name in checkpoint.tensors:
            target = model.gguf_name(name)
            writer.write(target, encode(model.to_gguf(name, checkpoint.read(name)), layout[target][0]))
        for name, tensor in extra.items():
            writer.write(name, encode(tensor, "f32"))
    return path


def gguf_of(directory: Path, kind: str = "f32") -> Path:
    return write_dense(open_checkpoint(directory), directory / f"{kind}.gguf", kind)


def tiny_models(folder: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Gives the checkpoint of a name of `CONFIGS` and its f32 GGUF file, made when first asked for."""

    @cache
    def get(name: str) -> tuple[Path, Path]:
        directory = save_tiny(name, folder.mktemp(name))
        return directory, gguf_of(directory)

    return get


class LlamaCpp:
    """llama.cpp on a GGUF file: token ids, and logits with a float32 cache."""

    def __init__(self, path: Path, vocab_only: bool = False):
        self.api, _ = library()  # one log callback for the whole process: it must outlive every model
        settings = self.api.llama_model_default_params()
        settings.vocab_only = vocab_only
        self.model = self.api.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = self.api.llama_model_get_vocab(self.model)

    def tokenize(self, text: str, special: bool = True, add: bool = False) -> list[int]:
        raw = text.encode()
        room = (self.api.llama_token * (len(raw) + 8))()
        count = self.api.llama_tokenize(self.vocab, raw, len(raw), room, len(room), add, special)
        assert count >= 0
        return list(room[:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [len(ids), vocabulary]."""
        api = self.api
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 256, 256, 256
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32: the default cache is f16
        settings.flash_attn_type = 0
        context = api.llama_init_from_model(self.model, settings)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert api.llama_decode(context, batch) == 0
        size = api.llama_vocab_n_tokens(self.vocab)
        found = np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(ids), size)).copy()
        api.llama_batch_free(batch)
        api.llama_free(context)
        return found

    def close(self) -> None:
        self.api.llama_model_free(self.model)


def relative_gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def transformers_logits(directory: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
