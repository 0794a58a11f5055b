"""Shapes of the mesh, and what is refused."""

import pytest

from sftjax.errors import ConfigError
from sftjax.parallel import mesh


def test_all_axes_are_there_and_the_rest_is_filled_in():
    made = mesh.make({"fsdp": -1, "tensor": 2})
    assert dict(made.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1, "expert": 1}
    assert dict(mesh.make({}).shape)["fsdp"] == 8


def test_some_of_the_devices():
    import jax

    assert mesh.make({"data": 2}, jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"model": 2}, "model"),
        ({"fsdp": 3}, "needs 3 devices, there are 8"),
        ({"fsdp": 3, "data": -1}, "8 devices can't be divided by 3"),
        ({"fsdp": -1, "data": -1}, "at most one"),
        ({"fsdp": 0}, "positive"),
    ],
)
def test_what_is_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        mesh.make(shape)
