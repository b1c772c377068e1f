"""Dense packing of small unsigned codes into 32-bit words, which GPTQ and compressed-tensors share.

Code i of a row takes bits ``i * bits`` to ``(i + 1) * bits`` of the row, counted from the lowest bit of its
first word. Three-bit codes therefore cross words: 32 of them fill three words.
"""

from __future__ import annotations

import math

import torch


def words(count: int, bits: int) -> int:
    """How many 32-bit words ``count`` codes take."""
    return math.ceil(count * bits / 32)


def pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the last dimension of ``codes`` [rows, n], whole numbers from 0 to 2**bits - 1.

    Returns int32 [rows, ceil(n * bits / 32)], the bits behind the last code zero. ValueError for a code that
    does not fit: it would change its neighbours.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit into {bits} bits")
    rows, count = codes.shape
    block, block_words = _block(bits)
    blocks = math.ceil(count / block)
    padded = torch.nn.functional.pad(codes, (0, blocks * block - count)).view(rows, blocks, block)
    out = torch.zeros(rows, blocks, block_words, dtype=torch.int32, device=codes.device)
    for i in range(block):
        word, shift = divmod(i * bits, 32)
        code = padded[..., i].to(torch.int32)
        out[..., word] |= code << shift
        if shift + bits > 32:
            out[..., word + 1] |= code >> (32 - shift)
    return out.view(rows, -1)[:, : words(count, bits)].contiguous()


def unpack_int32(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of each row of ``packed`` int32 [rows, words]: uint8 [rows, count]."""
    rows = packed.shape[0]
    block, block_words = _block(bits)
    blocks = math.ceil(count / block)
    padded = torch.nn.functional.pad(packed, (0, blocks * block_words - packed.shape[1]))
    padded = padded.view(rows, blocks, block_words)
    out = torch.empty(rows, blocks, block, dtype=torch.uint8, device=packed.device)
    for i in range(block):
        word, shift = divmod(i * bits, 32)
        low_bits = min(bits, 32 - shift)
        code = (padded[..., word] >> shift) & ((1 << low_bits) - 1)  # the mask drops the copies of the sign bit
        if low_bits < bits:
            code |= (padded[..., word + 1] << low_bits) & ((1 << bits) - 1)
        out[..., i] = code
    return out.view(rows, -1)[:, :count]


def _block(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words, and how many words these are."""
    bits_in_block = math.lcm(bits, 32)
    return bits_in_block // bits, bits_in_block // 32
