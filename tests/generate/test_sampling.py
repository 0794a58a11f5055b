"""Draws follow the exact distribution of the filters' definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.errors import ConfigError
from sftjax.generate import sampling
from sftjax.generate.sampling import Needs, Sampling

ROWS = 20_000


def exact(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """Probabilities by the book: sort, cut, normalise."""
    scores = np.asarray(logits, np.float64) / how.temperature
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    keep = np.ones(len(shares), bool)
    if how.top_k:
        keep[order[how.top_k :]] = False
    among = np.where(keep, shares, 0) / shares[keep].sum()
    before = np.cumsum(among[order]) - among[order]
    keep[order[before >= how.top_p]] = False
    keep &= shares >= how.min_p * shares.max()
    keep[order[0]] = True
    return np.where(keep, shares, 0) / shares[keep].sum()


def draw(logits: np.ndarray, how: Sampling, rows: int = ROWS) -> np.ndarray:
    settings = sampling.as_arrays([how])
    settings = jax.tree.map(lambda leaf: jnp.repeat(leaf, rows), settings)
    keys = jax.random.split(jax.random.key(7), rows)
    wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (rows, len(logits)))
    tokens, _ = jax.jit(sampling.choose, static_argnums=4)(wide, None, settings, keys, Needs.of([how]))
    return np.asarray(tokens)


@pytest.mark.parametrize(
    "how",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(1.3, top_k=7),
        Sampling(1.0, top_p=0.7),
        Sampling(1.5, top_k=20, top_p=0.8),
        Sampling(1.0, min_p=0.1),
        Sampling(0.9, top_k=150, top_p=0.97, min_p=0.005),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab, spread", [(40, 1.5), (400, 0.3)])  # the second: candidates don't reach top_p
def test_draws_have_the_exact_distribution(how, vocab, spread):
    logits = spread * np.random.default_rng(vocab).standard_normal(vocab)
    shares = exact(logits, how)
    counts = np.bincount(draw(logits, how), minlength=vocab)
    assert not counts[shares == 0].any()
    expected = shares * ROWS
    seen = expected > 5
    chi_squared = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = seen.sum() - 1
    assert chi_squared < freedom + 4 * np.sqrt(2 * freedom) + 8  # four standard deviations


def test_greedy_rows_may_stand_beside_drawn_ones():
    settings = [Sampling(), Sampling(1.0, top_k=3)]
    logits = jnp.array([[0.0, 2.0, 1.0, -1.0]] * 2)
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, logprobs = sampling.choose(logits, None, sampling.as_arrays(settings), keys, Needs.of(settings))
    assert tokens[0] == 1
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[jnp.arange(2), tokens], rtol=1e-6)


def test_a_token_without_probability_is_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 1.0, -np.inf])
    for how in (Sampling(1.0), Sampling(1.0, top_p=1.0, top_k=5), Sampling(1.0, min_p=1e-6)):
        assert set(draw(logits, how, 2000)) == {1, 3}


def test_repetition_penalty_as_in_transformers():
    logits = jnp.array([[2.0, -1.0, 1.5]])
    seen = jnp.array([[True, True, False]])
    how = Sampling(repetition_penalty=2.0)  # 1.0, -2.0, 1.5
    tokens, _ = sampling.choose(
        logits, seen, sampling.as_arrays([how]), jax.random.split(jax.random.key(0), 1), Needs.of([how])
    )
    assert tokens[0] == 2


@pytest.mark.parametrize(
    "field, value", [("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("repetition_penalty", 0)]
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})
