"""Tiny random models and a small trained tokenizer, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")


def tiny_model(family: str = "llama", seed: int = 0, **changes):
    """A random model of the family in float32 whose logits are far from flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {**SIZE, "vocab_size": 320, **changes}
    if family in ("gemma3_text", "qwen3"):
        size["head_dim"] = 16
    if family == "gemma3_text":
        size.setdefault("sliding_window", 32)
        size["num_hidden_layers"] = changes.get("num_hidden_layers", 7)  # the sixth attends to everything
        size["query_pre_attn_scalar"] = 16
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.02 if "norm" in name else 0.15
            noise = torch.randn(weight.shape) * scale
            weight.copy_(weight + noise if "norm" in name else noise)
    return model


def tiny_tokenizer(text: str | None = None, vocab_size: int = 320):
    """A byte-level BPE tokenizer with chat markers, trained on a little text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([text or "the cat sat on the mat and the dog ran to the house. " * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def save_tiny(directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A checkpoint directory with weights, config, tokenizer and chat template."""
    model = tiny_model(family, **changes).to(dtype)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes) -> None:
    """Change keys of config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
