import numpy as np
import pytest

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.run.text import calibration_rows, other_rows
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(save_tiny(tmp_path_factory.mktemp("text") / "base"))


@pytest.mark.parametrize("seed", [0, 5])
def test_other_rows_are_none_that_the_rounding_saw(checkpoint, seed, capsys):
    fitted = calibration_rows(checkpoint, (), 2048, 64, seed)
    others = other_rows(checkpoint, (), fitted, 4096, seed).ids
    assert len(others) >= 4096 // 64
    seen = {window.tobytes() for row in fitted.ids for window in np.lib.stride_tricks.sliding_window_view(row, 32)}
    again = [row for row in others for part in (row[:32], row[32:]) if part.tobytes() in seen]
    assert len(again) < len(others) // 20  # what is not random in the packaged text stands there more than once
    assert capsys.readouterr().err == ""


def test_where_the_text_has_too_few_others_all_of_it_is_taken_and_that_is_said(checkpoint, tmp_path, capsys):
    file = tmp_path / "short.txt"
    file.write_text("".join(f"line {number} of a text that is short\n" for number in range(60)))
    fitted = calibration_rows(checkpoint, (str(file),), 512, 32, 0)
    whole = other_rows(checkpoint, (str(file),), fitted, 65536, 0)
    assert len(whole.ids) > len(fitted.ids)
    assert "rows beside the 16 that the rounding is calibrated on" in " ".join(capsys.readouterr().err.split())
    np.save(tmp_path / "ids.npy", fitted.ids)
    alone = other_rows(checkpoint, (str(tmp_path / "ids.npy"),), fitted, 512, 0)
    assert np.array_equal(alone.ids, fitted.ids)
    assert "has 0 rows beside" in " ".join(capsys.readouterr().err.split())
