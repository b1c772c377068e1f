import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmlite.checkpoint.safetensors_index import read_header, read_index
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.errors import InputError


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.randint(0, 255, (2, 2, 2)).to(torch.uint8),
        "d": torch.tensor(7), "e": torch.zeros(0, 4), "f": torch.randn(8, 2).half(),
    }  # fmt: skip


def raw_file(path, header: object, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("limit", [10**9, 40])
def test_what_is_written_reads_back_in_the_reference_reader_and_in_ours(tmp_path, limit):
    want = tensors()
    layout = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in want.items()}
    with SafetensorsWriter(tmp_path, layout, limit) as writer:
        for name in reversed(list(want)):  # any order
            writer.write(name, want[name])
    theirs: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        theirs.update(load_file(file))
    ours = {name: entry.read() for name, entry in read_index(tmp_path).items()}
    assert theirs.keys() == ours.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours[name], tensor)
        assert ours[name].dtype == tensor.dtype
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit == 40)


def test_the_reference_writer_is_read(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = read_index(tmp_path)
    assert {n: e.shape for n, e in ours.items()} == {n: tuple(t.shape) for n, t in tensors().items()}


def test_a_writer_wants_exactly_what_was_declared(tmp_path):
    writer = SafetensorsWriter(tmp_path, {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.int8, (1,))})
    writer.write("a", torch.zeros(2))
    for name, tensor in [
        ("a", torch.zeros(2)),
        ("b", torch.zeros(1)),
        ("c", torch.zeros(1)),
        ("b", torch.zeros(2).char()),
    ]:
        with pytest.raises(ValueError):
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="never written: b"):
        writer.close()
    writer.abandon()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "beyond the end": ({"a": {**F32, "shape": [4], "data_offsets": [0, 16]}}, 8, "truncated"),
    "bytes against shape": ({"a": {**F32, "shape": [3]}}, 8, "needs 12 bytes"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12, "overlap"),
    "gap": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20, "leave a gap"),
    "trailing": ({"a": F32}, 12, "behind the last"),
    "dtype": ({"a": {**F32, "dtype": "F31"}}, 8, "dtype 'F31'"),
    "negative": ({"a": {**F32, "data_offsets": [-8, 0]}}, 8, "data_offsets"),
    "huge shape": ({"a": {**F32, "shape": [2**62, 4]}}, 8, "needs"),
    "bool shape": ({"a": {**F32, "shape": [True, 2]}}, 8, "shape"),
    "no fields": ({"a": {"dtype": "F32"}}, 8, "lacks"),
    "not an object": ([1], 0, "not a JSON object"),
    "not JSON": (b"{nope", 0, "not JSON"),
    "too deep": (b"[" * 200_000, 0, "not JSON"),
    "a number without end": (b'{"a": ' + b"9" * 5000 + b"}", 0, "not JSON"),
    "doubled": (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), 8, "twice"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused(tmp_path, case):
    header, size, said = LIES[case]
    with pytest.raises(InputError, match=said):
        read_header(raw_file(tmp_path / "model.safetensors", header, b"\0" * size))


def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(InputError, match="claims"):
        read_header(file)
    file.write_bytes(b"abc")
    with pytest.raises(InputError, match="too short"):
        read_header(file)


def test_every_truncation_is_noticed(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_index(tmp_path)


def test_shard_indexes_are_checked(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")

    def index(**weight_map):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return read_index(tmp_path)

    assert index(a="one.safetensors", b="two.safetensors").keys() == {"a", "b"}
    for wrong, said in [
        ({"a": "three.safetensors"}, "not there"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "does not have"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "it lies in"),
        ({"a": "../one.safetensors"}, "not the name of a file"),
    ]:
        with pytest.raises(InputError, match=said):
            index(**wrong)
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="stands in both"):
        index(a="one.safetensors", b="two.safetensors")


def test_pickle_is_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="unpickling runs code"):
        read_index(tmp_path)
