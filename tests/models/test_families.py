"""Every family against transformers' results: logits, losses and gradients, packed and not; greedy text."""

import sys
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import family_cases as cases  # noqa: E402

from sftjax.generate import sample  # noqa: E402
from sftjax.models import decoder  # noqa: E402

RUNTIME = decoder.Runtime(compute_dtype="float32")
LOGITS, GRADIENTS, LOSSES = 2e-5, 1e-5, 2e-6  # relative: to the largest logit, the tensor's largest gradient, the loss


@pytest.fixture(scope="module", params=cases.CASES)
def case(request):
    with np.load(GOLDEN / "families" / f"{request.param}.npz") as stored:
        ours = cases.build(request.param)
        return ours, cases.compiled(ours, RUNTIME), dict(stored)


@pytest.mark.parametrize("layout", ["unpacked", "packed"])
def test_logits_losses_and_gradients_are_those_of_transformers(case, layout):
    ours, run, stored = case
    batch, places = cases.layouts()[layout]
    found = run(batch)
    assert np.isclose(found["nll"], stored["nll"], rtol=LOSSES)
    assert np.isclose(found["moe_loss"], stored["moe_loss"], rtol=LOSSES)
    for number, ((row, column), length) in enumerate(zip(places, cases.LENGTHS, strict=True)):
        logits = found["logits"][row, column + cases.kept_positions(length)]
        assert np.abs(logits - stored[f"logits_{number}"]).max() <= LOGITS * stored["logit_scale"]
    for name, gradient in cases.as_tensors(ours, found["gradients"]).items():
        entries = gradient.reshape(-1)[cases.kept_entries(name, gradient.size)]
        error = np.abs(entries - stored[f"gradient/{name}"]).max() / stored[f"largest/{name}"]
        assert error <= GRADIENTS, f"{name}: {error:.2g}"
        assert np.isclose(np.abs(gradient).max(), stored[f"largest/{name}"], rtol=GRADIENTS), name


def test_greedy_text_is_that_of_transformers(case):
    """Up to the first place where the reference hardly prefers its token: rounding may decide there."""
    ours, _, stored = case
    generator = sample.Generator(ours.config, RUNTIME, {"params": ours.params}, batch_size=2)
    outputs = generator.generate(cases.prompts(), max_new_tokens=cases.NEW_TOKENS)
    for number, output in enumerate(outputs):
        unsure = np.flatnonzero(stored[f"lead_{number}"] < 1e-3)
        upto = unsure[0] if len(unsure) else cases.NEW_TOKENS
        np.testing.assert_array_equal(output.tokens[:upto], stored[f"greedy_{number}"][:upto])


def test_segments_leave_each_other_alone(case):
    """Other tokens in the first document don't change the second one's logits."""
    ours, run, _ = case
    batch, places = cases.layouts()["packed"]
    (row, first), (_, second) = places[2], places[0]
    assert first == 0 < second
    changed = batch | {"tokens": batch["tokens"].copy()}
    changed["tokens"][row, :second] = (batch["tokens"][row, :second] + 7) % ours.config.vocab_size
    before, after = run(batch)["logits"][row], run(changed)["logits"][row]
    scale = np.abs(before).max()
    assert np.abs(before - after)[second:].max() <= 1e-6 * scale
    assert np.abs(before - after)[: second - 1].max() > 1e-3 * scale
