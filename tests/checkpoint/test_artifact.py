import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmlite.checkpoint.artifact import atomic_directory, read_manifest, write_manifest
from llmlite.errors import InputError


def test_it_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with atomic_directory(out) as partial:
        (partial / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out"):
        pass  # an empty directory is fine
    (tmp_path / "out" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("out", "file"):
        with pytest.raises(InputError), atomic_directory(tmp_path / name):
            pytest.fail("started")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_links_and_the_current_directory_are_refused_before_work(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (tmp_path / "link", Path()):
        with pytest.raises(InputError), atomic_directory(out):
            pytest.fail("started")
    with atomic_directory(Path("new")):
        pass
    assert (tmp_path / "here" / "new").is_dir()


def test_the_leavings_of_a_killed_run_are_removed_and_a_live_one_is_not(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from llmlite.checkpoint.artifact import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as p: (p / 'half').write_text('x'); print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="another process"), atomic_directory(tmp_path / "out"):
            pytest.fail("started")
    finally:
        other.kill()
        other.wait()
    assert not (tmp_path / "out").exists()
    with atomic_directory(tmp_path / "out") as partial:
        assert os.listdir(partial) == []


def test_the_manifest_is_replaced_in_one_step(tmp_path):
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, {"a": 1})
    write_manifest(tmp_path, {"a": 2})
    assert read_manifest(tmp_path) == {"a": 2}
    assert os.listdir(tmp_path) == ["llmlite.json"]
    (tmp_path / "llmlite.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_manifest(tmp_path)
