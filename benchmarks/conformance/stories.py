"""Write llama2.c's stories260K as the GGUF file that llama.cpp's server tests ask for.

    python -m benchmarks.conformance.stories FOLDER OUT.gguf

FOLDER has stories260K.bin and tok512.bin, in llama2.c's layout (version 0).
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np

CHATML = (
    "{{ bos_token }}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What llama-server takes for a file without a template; this server asks for one in the file."""


def tokens_of(raw: bytes, count: int) -> tuple[list[bytes], list[float], list[int]]:
    """The vocabulary's pieces, scores and GGUF types, in SentencePiece's spelling."""
    position, pieces, scores, kinds = 4, [], [], []
    for number in range(count):
        score, length = struct.unpack_from("<fi", raw, position)
        piece = raw[position + 8 : position + 8 + length]
        position += 8 + length
        special = {0: gguf.TokenType.UNKNOWN, 1: gguf.TokenType.CONTROL, 2: gguf.TokenType.CONTROL}
        kind = special.get(number, gguf.TokenType.BYTE if number < 259 else gguf.TokenType.NORMAL)
        pieces.append(piece.strip(b"\n") if number < 3 else piece.replace(b" ", "▁".encode()))
        scores.append(score)
        kinds.append(int(kind))
    return pieces, scores, kinds


def write_stories(folder: Path, out: Path) -> None:
    raw = (folder / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, _ = struct.unpack_from("<7i", raw)
    values = np.frombuffer(raw, "<f4", offset=28)
    kv_dim = dim // heads * kv_heads
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        begin, position = position, position + int(np.prod(shape))
        return values[begin:position].reshape(shape)

    tensors = {"token_embd.weight": take(vocabulary, dim)}
    stacks = (
        ("attn_norm", (dim,)), ("attn_q", (dim, dim)), ("attn_k", (kv_dim, dim)), ("attn_v", (kv_dim, dim)),
        ("attn_output", (dim, dim)), ("ffn_norm", (dim,)), ("ffn_gate", (hidden, dim)), ("ffn_down", (dim, hidden)),
        ("ffn_up", (hidden, dim)),
    )  # fmt: skip
    for name, shape in stacks:
        for layer, tensor in enumerate(take(layers, *shape)):
            tensors[f"blk.{layer}.{name}.weight"] = tensor
    tensors["output_norm.weight"] = take(dim)
    pieces, scores, kinds = tokens_of((folder / "tok512.bin").read_bytes(), vocabulary)
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_name("stories260K")
    writer.add_context_length(2048)  # as the file that the tests were written for says, beyond the 512 it learned
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_stories(Path(sys.argv[1]), Path(sys.argv[2]))
