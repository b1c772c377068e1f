import numpy as np
import pytest

from llmlite.adapt.repair import Repaired
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.run import quantize as run_quantize
from llmlite.run.quantize import QuantizeSettings, quantize
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


def test_a_repair_trains_on_rows_that_the_rounding_was_not_fitted_to(checkpoint, tmp_path, monkeypatch):
    taken = []

    def repair(_checkpoint, _stored, ids, *_):
        taken.append(ids)
        return Repaired(1.0, 1.0, 0, 0, 0.0)

    monkeypatch.setattr(run_quantize, "repair", repair)
    given = {"calibration_tokens": 2048, "row_length": 64, "repair": True, "repair_steps": 8}
    for solver, seen in (("feedback", 0), ("rtn", 32)):
        settings = QuantizeSettings(to="gptq:w3g32", solver=solver, **given)
        quantize(checkpoint.source, tmp_path / solver, settings)
        rows = {row.tobytes() for row in calibration_rows(checkpoint, (), 2048, 64, 0).ids}
        assert sum(row.tobytes() in rows for row in taken[-1]) == seen
        assert len(taken[-1]) >= 8
