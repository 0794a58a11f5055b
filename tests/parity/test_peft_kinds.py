"""Every kind of adapter on every base of `peft_kinds.py`, made by PEFT here: its logits within 1e-4, or refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from sftjax import loading  # noqa: E402
from sftjax.errors import ConfigError  # noqa: E402
from sftjax.models import decoder  # noqa: E402
from sftjax.peft import merge  # noqa: E402
from sftjax.weights import hf, peft_format  # noqa: E402
from tests.parity import peft_kinds  # noqa: E402

RUNTIME = decoder.Runtime(compute_dtype="float32", remat="none")
TOKENS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
TOKENS[0, :3] = torch.tensor([17, 95, 3])  # of the rows that are trained
CASES = [(base, kind) for base in (*peft_kinds.BASES, *peft_kinds.MIXTURES) for kind in peft_kinds.kinds_of(base)]


@functools.partial(jax.jit, static_argnums=0)
def logits(config, variables, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = decoder.hidden_states(config, RUNTIME, variables, tokens, positions, jnp.ones_like(tokens))
    return decoder.logits(config, RUNTIME, variables, hidden)


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_it_is_what_it_is_in_peft(tmp_path, base, kind):
    settings = peft_kinds.kinds_of(base)[kind]
    wrapped = peft_kinds.make_adapter(tmp_path, base, settings)
    files = hf.open_model(tmp_path / "base")
    params = hf.load_params(files, files.config, jnp.float32)
    read = functools.partial(loading.with_adapter, files.config, params, str(tmp_path / "adapter"), files.family.layout)
    if "_refused" in settings:
        with pytest.raises(ConfigError, match=settings["_refused"]):
            read()
        return
    with torch.no_grad():
        expected = wrapped(TOKENS).logits.numpy()
    config, params, adapter = read()
    variables = {"params": params, "adapter": jax.tree.map(jnp.asarray, adapter)}
    if settings.get("_merges", True):  # all of one shape then, so compiled once for each base
        variables = {"params": merge.merge(params, variables["adapter"])}
    np.testing.assert_allclose(logits(config, variables, TOKENS.numpy()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", peft_kinds.OTHER_METHODS)
def test_other_methods_are_refused_by_name(tmp_path, method):
    model = peft_kinds.make_base("llama")
    peft.get_peft_model(model, peft_kinds.OTHER_METHODS[method]()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"peft_type '[A-Z0-9_]+'; only LORA"):
        peft_format.read_spec(tmp_path)
