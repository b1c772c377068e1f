"""Importance matrices: llama.cpp reads ours, we read llama.cpp's, and what it measured is there."""

import os
import shutil
import struct
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llama_cpp_tools import FOLDER
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from llmlite.formats.gguf.imatrix import Imatrix, diagonal, read_imatrix, write_imatrix
from tests.gguf_models import TEXTS, tiny_models

gguf = pytest.importorskip("gguf")

ROWS, LENGTH = 4, 64


def program(name: str) -> str:
    """One of llama.cpp's programs: built by benchmarks/llama_cpp_tools.py, or installed."""
    built = FOLDER / "bin" / name
    found = str(built) if built.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not there: python benchmarks/llama_cpp_tools.py builds it")
    return found


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models(tmp_path_factory)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """What llama-imatrix makes of a text that every tiny tokenizer knows."""
    made = {}

    def get(name, kind="gguf"):
        if (name, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{kind}")
            (folder / "text.txt").write_text(text())
            exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 1, "-ngl", 0]
            size = ["-c", LENGTH, "-b", LENGTH, "-ub", LENGTH, "--chunks", ROWS, "--no-ppl"]
            out = folder / f"imatrix.{kind}"
            run(program("llama-imatrix"), "-m", tiny(name)[1], "-f", folder / "text.txt", "-o", out,
                "--output-format", kind, *exact, *size)  # fmt: skip
            made[name, kind] = out
        return made[name, kind]

    return get


def text() -> str:
    return " ".join(TEXTS) * 12


def small(**changes) -> Imatrix:
    sums = {"blk.0.ffn_up.weight": torch.tensor([0.0, 2.0, 3.0]), "blk.0.attn_q.weight": torch.rand(32)}
    counts = {"blk.0.ffn_up.weight": 4, "blk.0.attn_q.weight": 1024}
    return Imatrix(
        **{"sums": sums, "counts": counts, "chunk_count": 2, "chunk_size": 512, "datasets": ("a", "é")} | changes
    )


def for_checkpoint(checkpoint) -> Imatrix:
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    sums = {
        f"blk.{layer}.{names[module.rpartition('.')[2]]}.weight": torch.rand(96 if "down" in module else 64)
        for layer in range(checkpoint.num_layers)
        for module in checkpoint.family.linears
    }
    return small(sums=sums, counts=dict.fromkeys(sums, 100))


def legacy(entries, tail=b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        out += np.array(values, dtype="<f4").tobytes()
    return out + tail


def same(a: Imatrix, b: Imatrix) -> bool:
    tensors = a.sums.keys() == b.sums.keys() and all(torch.equal(a.sums[n], b.sums[n]) for n in a.sums)
    fields = ("counts", "chunk_count", "chunk_size", "datasets")
    return tensors and all(getattr(a, f) == getattr(b, f) for f in fields)


def test_what_is_written_is_read_back(tmp_path):
    write_imatrix(tmp_path / "i.gguf", small())
    assert os.listdir(tmp_path) == ["i.gguf"]
    torch.manual_seed(0)
    wanted = small()
    write_imatrix(tmp_path / "i.gguf", wanted)  # one that is there is replaced
    assert same(read_imatrix(tmp_path / "i.gguf"), wanted)
    write_imatrix(tmp_path / "none.gguf", small(datasets=()))
    assert read_imatrix(tmp_path / "none.gguf").datasets == ()


def test_the_package_gguf_reads_it(tmp_path):
    wanted = small()
    write_imatrix(tmp_path / "i.gguf", wanted)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix", "imatrix.datasets": ["a", "é"], "imatrix.chunk_count": 2, "imatrix.chunk_size": 512,
    }  # fmt: skip
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 4
    for name, sums in wanted.sums.items():
        assert np.array_equal(tensors[name + ".in_sum2"], sums.numpy())
        assert tensors[name + ".counts"].tolist() == [wanted.counts[name]]


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for call in (1, 2):  # killed while the data, and while the magic number is flushed
        seen = []

        def fsync(_handle, seen=seen, call=call):
            seen.append((tmp_path / ".i.gguf.partial").read_bytes()[:4])
            if len(seen) == call:
                killed()

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            write_imatrix(tmp_path / "i.gguf", small())
        assert os.listdir(tmp_path) == []
        assert seen[0] == bytes(4)
    assert seen[1] == b"GGUF"


def test_the_legacy_format(tmp_path):
    entries = [(b"blk.0.ffn_up.weight", 4, [0.0, 2.0, 3.0]), (b"blk.1.ffn_up.weight", 2, [5.0])]
    file = tmp_path / "i.dat"
    for tail, chunks, datasets in (
        (struct.pack("<ii", 4, 3) + "té".encode(), 4, ("té",)),
        (struct.pack("<ii", 4, 0), 4, ()),
        (struct.pack("<i", 4), 4, ()),
        (b"", 0, ()),
    ):
        file.write_bytes(legacy(entries, tail))
        found = read_imatrix(file)
        assert {name: sums.tolist() for name, sums in found.sums.items()} == {n.decode(): v for n, _, v in entries}
        assert list(found.counts.values()) == [4, 2]
        assert (found.chunk_count, found.chunk_size, found.datasets) == (chunks, 0, datasets)
    with pytest.raises(InputError, match="the size of its chunks is not known"):
        write_imatrix(tmp_path / "i.gguf", found)


ENTRY = (b"blk.0.ffn_up.weight", 4, [1.0, 2.0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "ends inside its data"),
        (b"\x00\x00\x00\x00", "the number of tensors is 0"),
        (legacy([ENTRY])[:-1], "ends inside its data"),
        (legacy([ENTRY])[:10], "ends inside its data"),
        (legacy([ENTRY], b"\x01\x00"), "ends inside its data"),
        (legacy([ENTRY], struct.pack("<ii", 1, 5) + b"abc"), "ends inside its data"),
        (legacy([ENTRY], struct.pack("<ii", 1, -5)), "length of a name is -5"),
        (legacy([ENTRY], struct.pack("<ii", 1, 1) + b"abc"), "2 bytes after its end"),
        (legacy([ENTRY, ENTRY]), "stands twice"),
        (legacy([(b"x", 4, [])]), "the width of x is 0"),
        (legacy([(b"", 4, [1.0])]), "length of a name is 0"),
        (legacy([(b"\xff", 4, [1.0])]), "not UTF-8"),
        (legacy([(b"x" * 300, 4, [1.0])]), "a name of 300 bytes"),
        (legacy([(b"x", 0, [1.0])]), "x has a count of 0"),
        (legacy([(b"x", 4, [np.nan])]), "x has sums that are not finite"),
        (legacy([(b"x", 4, [np.inf])]), "x has sums that are not finite"),
        (legacy([(b"x", 4, [-1.0])]), "x has negative sums"),
        (b'{"metadata": {}, "text": "a JSON file is no imatrix"}', "not an importance matrix"),
        (b"GGUF\x03\x00\x00\x00", "too short for a GGUF file"),
    ],
)
def test_a_file_that_is_no_imatrix_is_refused(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_imatrix(tmp_path / "x")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_imatrix(tmp_path / "x")


def by_hand(path, tensors, keys=None):
    """A GGUF file through the package gguf, whose writer puts general.architecture first."""
    writer = gguf.GGUFWriter(path, "")
    keys = {"general.type": "imatrix", "imatrix.datasets": ["a"], "imatrix.chunk_count": 2, "imatrix.chunk_size": 8} | (
        keys or {}
    )
    for key, value in keys.items():
        {str: writer.add_string, int: writer.add_uint32, list: writer.add_array, type(None): lambda *_: None}[
            type(value)
        ](key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def floats(*values):
    return np.array(values, dtype=np.float32)


def test_a_file_made_by_hand(tmp_path):
    tensors = {
        "x.counts": floats(4),
        "x.in_sum2": floats(1, 2).reshape(1, 2),
        "x.in_sum": floats(7, 8),
        "y.in_sum2": floats(3),
        "y.counts": floats(8),
    }
    found = read_imatrix(by_hand(tmp_path / "i.gguf", tensors))
    wanted = Imatrix({"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0])}, {"x": 4, "y": 8}, 2, 8, ("a",))
    assert same(found, wanted)


@pytest.mark.parametrize(
    ("tensors", "keys", "said"),
    [
        ({"x.in_sum2": floats(1)}, {}, "sums and counts belong together, 'x'"),
        ({"x.counts": floats(1), "y.in_sum2": floats(1)}, {}, "belong together, 'x'"),
        ({"x.weight": floats(1)}, {}, "holds no tensor's sums"),
        ({"x.in_sum2": floats(1), "x.counts": floats(0)}, {}, "x has a count of 0"),
        ({"x.in_sum2": floats(1), "x.counts": floats(np.nan)}, {}, "x.counts is nan"),
        ({"x.in_sum2": floats(1), "x.counts": floats(1.5)}, {}, "x.counts is 1.5"),
        ({"x.in_sum2": floats(1, 2), "x.counts": floats(1, 1)}, {}, "2 counts, as for a mixture of experts"),
        ({"x.in_sum2": floats(np.nan), "x.counts": floats(1)}, {}, "x has sums that are not finite"),
        ({"x.in_sum2": np.array([1.0], dtype=np.float16), "x.counts": floats(1)}, {}, "type f16; f32 is right"),
        ({"x.in_sum2": floats(1), "x.counts": floats(1)}, {"general.type": "model"}, "GGUF file of type 'model'"),
        ({"x.in_sum2": floats(1), "x.counts": floats(1)}, {"imatrix.datasets": "a"}, "imatrix.datasets is 'a'"),
        ({"x.in_sum2": floats(1), "x.counts": floats(1)}, {"imatrix.chunk_count": None}, "imatrix.chunk_count is None"),
        ({"x.in_sum2": floats(1), "x.counts": floats(1)}, {"imatrix.chunk_size": "8"}, "imatrix.chunk_size is '8'"),
    ],
)
def test_a_gguf_file_that_is_no_imatrix_is_refused(tmp_path, tensors, keys, said):
    with pytest.raises(InputError, match=said):
        read_imatrix(by_hand(tmp_path / "i.gguf", tensors, keys))


def test_a_truncated_gguf_file_is_refused(tmp_path):
    write_imatrix(tmp_path / "i.gguf", small())
    whole = (tmp_path / "i.gguf").read_bytes()
    for length in (len(whole) - 32, 200, 30):
        (tmp_path / "i.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated"):
            read_imatrix(tmp_path / "i.gguf")


def test_a_model_is_checked_against_it(tiny):
    directory, file = tiny("llama")
    checkpoint = open_checkpoint(directory)
    fitting = for_checkpoint(checkpoint)
    fitting.check(checkpoint)
    head = {"output.weight": torch.rand(64)}
    replace(fitting, sums=fitting.sums | head, counts=fitting.counts | {"output.weight": 1}).check(checkpoint)
    name = "model.layers.2.mlp.down_proj.weight"
    wanted = fitting.sums["blk.2.ffn_down.weight"] / 100
    assert torch.equal(diagonal(fitting, checkpoint.family, name), wanted)
    with pytest.raises(InputError, match=r"lacks output.weight, the sums for lm_head"):
        diagonal(fitting, checkpoint.family, "lm_head.weight")
    with pytest.raises(InputError, match="type 'model', not an importance matrix"):
        read_imatrix(file)

    def without(*gone):
        return replace(
            fitting,
            sums={n: s for n, s in fitting.sums.items() if n not in gone},
            counts={n: c for n, c in fitting.counts.items() if n not in gone},
        )

    with pytest.raises(InputError, match=r"lacks blk.1.attn_k.weight, blk.1.ffn_up.weight of"):
        without("blk.1.attn_k.weight", "blk.1.ffn_up.weight").check(checkpoint)
    with pytest.raises(InputError, match=r"lacks blk.0.attn_q.weight, .* and 18 more of"):
        replace(fitting, sums={"x": torch.rand(3)}, counts={"x": 1}).check(checkpoint)
    fitting.sums["blk.1.ffn_up.weight"] = torch.rand(96)
    with pytest.raises(InputError, match=r"blk.1.ffn_up.weight has 96 channels, .* has 64"):
        fitting.check(checkpoint)
    deeper = {"blk.3.ffn_up.weight": torch.rand(64)}
    fitting.sums["blk.1.ffn_up.weight"] = torch.rand(64)
    with pytest.raises(InputError, match=r"has blk.3.ffn_up.weight, which .* lacks"):
        replace(fitting, sums=fitting.sums | deeper, counts=fitting.counts | dict.fromkeys(deeper, 1)).check(checkpoint)


def mean_squares(directory):
    """Of every linear layer's inputs in transformers, by Hugging Face name, over the rows that llama-imatrix takes."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer(text()).input_ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)
    bos = tokenizer("a").input_ids
    if len(bos) > len(tokenizer("a", add_special_tokens=False).input_ids):
        ids[:, 0] = bos[0]  # llama-imatrix puts it in the place of each row's first token
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.update({f"{name}.weight": args[0].flatten(0, 1).square().mean(0)})
            )
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "gemma3"])
def test_llama_imatrix_measures_the_inputs_in_transformers(name, tiny, measured):
    found = read_imatrix(measured(name))
    checkpoint = open_checkpoint(tiny(name)[0])
    found.check(checkpoint)
    assert set(found.counts.values()) == {ROWS * LENGTH}
    assert (found.chunk_count, found.chunk_size) == (ROWS, LENGTH)
    assert len(found.datasets) == 1
    wanted = mean_squares(tiny(name)[0])
    assert len(wanted) == len(found.sums)
    for hf_name, ours in wanted.items():
        theirs = diagonal(found, checkpoint.family, hf_name)
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=0, msg=lambda m, n=hf_name: f"{n}: {m}")


def test_what_llama_imatrix_wrote_we_write_byte_for_byte(measured, tmp_path):
    file = measured("llama")
    write_imatrix(tmp_path / "ours.gguf", read_imatrix(file))
    assert (tmp_path / "ours.gguf").read_bytes() == file.read_bytes()


def test_llama_imatrix_tells_the_same_in_the_legacy_format(tiny, measured):
    new, old = read_imatrix(measured("llama")), read_imatrix(measured("llama", "dat"))
    checkpoint = open_checkpoint(tiny("llama")[0])
    old.check(checkpoint)
    assert (old.chunk_count, old.chunk_size, set(old.counts.values())) == (ROWS, 0, {ROWS})
    assert [name.endswith("text.txt") for name in old.datasets] == [True]
    for layer in range(checkpoint.num_layers):
        for module in checkpoint.family.linears:
            name = f"model.layers.{layer}.{module}.weight"
            a, b = (diagonal(imatrix, checkpoint.family, name) for imatrix in (new, old))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_llama_quantize_reads_ours(tiny, tmp_path):
    directory, file = tiny("llama")
    torch.manual_seed(3)
    imatrix = for_checkpoint(open_checkpoint(directory))

    def quantized(name):
        out = tmp_path / f"q-{name}"
        said = run(program("llama-quantize"), "--imatrix", tmp_path / name, file, out, "q4_0", 1)
        assert "loaded 21 importance matrix entries" in said
        assert "computed on 2 chunks" in said
        reader = gguf.GGUFReader(out)
        assert reader.fields["quantize.imatrix.dataset"].contents() == "a"
        return {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}

    write_imatrix(tmp_path / "ours.gguf", imatrix)
    first = quantized("ours.gguf")
    entries = [(name.encode(), 1, (sums / 100).numpy()) for name, sums in imatrix.sums.items()]
    (tmp_path / "by-hand.dat").write_bytes(legacy(entries, struct.pack("<ii", 2, 1) + b"a"))
    assert quantized("by-hand.dat") == first
    changed = imatrix.sums | {"blk.1.ffn_up.weight": imatrix.sums["blk.1.ffn_up.weight"].flip(0)}
    write_imatrix(tmp_path / "other.gguf", replace(imatrix, sums=changed))
    other = quantized("other.gguf")
    assert [name for name in first if first[name] != other[name]] == ["blk.1.ffn_up.weight"]
