"""What the Ray Serve application takes; a cluster is not started here."""

import pytest

pytest.importorskip("ray.serve")

from llmlite.errors import InputError
from llmlite.serve.ray_app import build


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "artifact: is missing"),
        ({"artifact": "a", "port": "1"}, "Ray Serve's to set"),
        ({"artifact": "a", "parrallel": "1"}, "did you mean parallel"),
        ({"artifact": "a", "parallel": "many"}, "parallel"),
        ({"artifact": "a", "max_replicas": "x"}, "max_replicas"),
    ],
)
def test_what_is_wrong_is_said(given, told):
    with pytest.raises(InputError, match=told):
        build(given)
