"""Every family against transformers, live: every logit and every gradient entry."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import family_cases as cases

from sftjax.models import decoder

pytestmark = pytest.mark.parity
RUNTIME = decoder.Runtime(compute_dtype="float32")


@pytest.fixture(scope="module", params=cases.CASES)
def case(request):
    pytest.importorskip("torch")
    import make_families

    ours = cases.build(request.param)
    return ours, cases.compiled(ours, RUNTIME), make_families.run(make_families.model_of(request.param))


@pytest.mark.parametrize("layout", ["unpacked", "packed"])
def test_logits_and_gradients(case, layout):
    ours, run, theirs = case
    batch, places = cases.layouts()[layout]
    found = run(batch)
    assert np.isclose(found["nll"], theirs["nll"], rtol=2e-6)
    assert np.isclose(found["moe_loss"], theirs["moe_loss"], rtol=2e-6)
    scale = max(np.abs(logits).max() for logits in theirs["logits"])
    for (row, column), logits in zip(places, theirs["logits"], strict=True):
        assert np.abs(found["logits"][row, column : column + len(logits)] - logits).max() <= 2e-5 * scale
    gradients = cases.as_tensors(ours, found["gradients"])
    assert set(gradients) == set(theirs["gradients"])
    for name, gradient in theirs["gradients"].items():
        assert np.abs(gradients[name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name
