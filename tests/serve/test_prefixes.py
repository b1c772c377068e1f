"""Prefixes outlive their slot and the process, within limits, and never come back wrong."""

import logging

import numpy as np
import pytest

from llmlite.serve.prefixes import PrefixStore


def ids(*parts):
    return np.array([token for part in parts for token in part], np.int32)


def state(size, letter=b"s"):
    return letter * size


def test_the_longest_common_beginning_is_found():
    store = PrefixStore("f", 10**6)
    store.put(ids(range(50)), None, state(50, b"a"))
    store.put(ids(range(20), [99] * 60), None, state(80, b"b"))
    match = store.find(ids(range(20), [99] * 10, [7]), None)
    assert match.length == 30 and store.take(match) == state(80, b"b")
    assert store.find(ids(range(20), [99] * 10), "adapter") is None
    assert store.find(ids([5, 6]), None) is None


def test_states_that_cannot_be_cut_are_found_whole_or_not_at_all():
    store = PrefixStore("f", 10**6, whole=True)
    store.put(ids(range(50)), None, state(50))
    store.put(ids(range(60)), None, state(60))
    assert store.find(ids(range(49), [7]), None) is None
    assert store.find(ids(range(50)), None) is None, "the prompt's last token must be left over"
    assert store.find(ids(range(51)), None).length == 50


def test_a_longer_prefix_takes_the_place_of_a_shorter_one():
    store = PrefixStore("f", 10**6)
    store.put(ids(range(50)), None, state(50))
    store.put(ids(range(70)), None, state(70))
    assert store.sizes() == (70, 0)
    assert store.has(ids(range(60)), None) and not store.has(ids(range(71)), None)


def test_memory_is_bounded_and_the_least_used_leaves_first():
    store = PrefixStore("f", 250)
    for first in (100, 200):
        store.put(ids([first] * 50), None, state(100))
    store.take(store.find(ids([100] * 9), None))
    store.put(ids([300] * 50), None, state(100))
    assert store.sizes() == (200, 0)
    assert store.has(ids([100] * 50), None) and store.has(ids([300] * 50), None)
    assert not store.has(ids([200] * 50), None)
    store.put(ids([400] * 50), None, state(251))
    assert not store.has(ids([400] * 50), None)


def test_files_outlive_the_process_and_leave_with_another_fingerprint(tmp_path):
    store = PrefixStore("f", 300, tmp_path, 10**6)
    for first in range(4):
        store.put(ids([first] * 200), "adapter" if first else None, state(200, b"%d" % first))
    store.close()
    again = PrefixStore("f", 300, tmp_path, 10**6)
    assert again.sizes() == (0, 800)
    match = again.find(ids([2] * 300), "adapter")
    assert match.length == 200 and again.take(match) == state(200, b"2")
    again.close()
    other = PrefixStore("g", 300, tmp_path, 10**6)
    assert other.find(ids([2] * 300), "adapter") is None
    other.close()


def test_the_disk_is_bounded(tmp_path):
    store = PrefixStore("f", 10**6, tmp_path, 500)
    for first in range(6):
        store.put(ids([first] * 200), None, state(200))
    store.close()
    assert len(list(tmp_path.iterdir())) <= 2
    again = PrefixStore("f", 10**6, tmp_path, 200)
    again.close()
    assert len(list(tmp_path.iterdir())) <= 1


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "header"])
def test_a_damaged_file_is_no_prefix(tmp_path, harm):
    store = PrefixStore("f", 300, tmp_path, 10**6)
    store.put(ids([5] * 200), None, state(200))
    store.close()
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
    if harm == "header":
        data[4:8] = b"\xff\xff\xff\xff"
    file.write_bytes(data[: {"cut": 300, "empty": 0}.get(harm, len(data))])
    again = PrefixStore("f", 300, tmp_path, 10**6)
    match = again.find(ids([5] * 300), None)
    assert match is None or again.take(match) is None
    assert again.find(ids([5] * 300), None) is None
    again.close()


def test_a_disk_that_is_full_costs_reuse_and_nothing_else(tmp_path, monkeypatch, caplog):
    for name in ("llmlite", "llmlite.serve"):  # a server that ran before may have left them as it wanted them
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.WARNING, logger="llmlite.serve")
    store = PrefixStore("f", 10**6, tmp_path, 10**6)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store.put(ids([5] * 200), None, state(200))
    store.close()
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert store.take(store.find(ids([5] * 300), None)) == state(200)
