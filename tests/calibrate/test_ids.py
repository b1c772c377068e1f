import hashlib
import io
from pathlib import Path

import numpy as np
import pytest

from llmlite.calibrate.ids import read_ids
from llmlite.errors import InputError


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.uint8, ">i4"])
def test_rows_of_integers_are_read_with_their_digest(tmp_path: Path, dtype):
    file = tmp_path / "ids.npy"
    ids = np.arange(12).reshape(3, 4).astype(dtype)
    np.save(file, ids)
    rows = read_ids(str(file))
    assert rows.ids.dtype == np.int64
    assert np.array_equal(rows.ids, np.arange(12).reshape(3, 4))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert rows.sources == ({"source": str(file), "sha256": digest, "rows": 3, "tokens": 12},)


BAD = {
    "floats": np.ones((2, 3)),
    "booleans": np.ones((2, 3), bool),
    "negative": np.array([[1, -1]]),
    "too large for int64": np.array([[1, 2**63]], dtype=np.uint64),
    "one dimension": np.arange(5),
    "three dimensions": np.zeros((2, 2, 2), int),
    "no row": np.zeros((0, 4), int),
    "no token": np.zeros((4, 0), int),
    "strings": np.array([["a"]]),
    "structured": np.zeros((2, 2), dtype=[("a", int)]),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_rows_of_token_ids_is_refused(tmp_path: Path, kind: str):
    file = tmp_path / "ids.npy"
    np.save(file, BAD[kind])
    with pytest.raises(InputError, match=r"ids\.npy: .*integers"):
        read_ids(str(file))


def test_pickled_objects_are_not_read(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    file = tmp_path / "ids.npy"
    np.save(file, np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"ids\.npy"):
        read_ids(str(file))
    assert not (tmp_path / "sprung").exists()


def saved() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(12).reshape(3, 4))
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1 2 3\n4 5 6\n",
        saved()[:-8],
        saved()[:20],
        b"\x93NUMPY\x01\x00\x10\x00{'descr': boom}\n",
        b"PK\x03\x04xx",
    ],
    ids=["empty", "text", "cut short", "cut in its header", "wrong header", "half a zip file"],
)
def test_bytes_that_are_no_array_are_refused(tmp_path: Path, data: bytes):
    file = tmp_path / "ids.npy"
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"ids\.npy"):
        read_ids(str(file))


def test_an_archive_of_arrays_is_refused(tmp_path: Path):
    np.savez(tmp_path / "ids.npz", ids=np.zeros((2, 2), int))
    with pytest.raises(InputError, match=r"ids\.npz"):
        read_ids(str(tmp_path / "ids.npz"))


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        read_ids(str(tmp_path / "nowhere.npy"))
    with pytest.raises(InputError):
        read_ids(str(tmp_path))
