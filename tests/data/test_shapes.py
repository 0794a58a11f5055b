"""Chat templates of every shape: what is trained of two turns, drawn."""

import pytest

from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError
from tests.data import shapes
from tests.data.tiny import chat, drawn

TURNS = {"messages": chat("Q1", "A1", "Q2", "A2")}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return {
        name: RowEncoder(shapes.load(shape, folder / str(i)), **shape.options)
        for i, (name, shape) in enumerate(shapes.SHAPES.items())
    }


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_two_turns_are_trained_as_drawn(encoders, name):
    shape, encoder = shapes.SHAPES[name], encoders[name]
    if shape.refused:
        with pytest.raises(RowError) as caught:
            encoder(TURNS)
        assert caught.value.reason == shape.refused
    else:
        assert [drawn(encoder.tokenizer, sample).rstrip("\n") for sample in encoder(TURNS)] == [
            text.rstrip("\n") for text in shape.drawn
        ]
