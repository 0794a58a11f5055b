"""Adapters of every kind that PEFT writes (tests/golden/make_peft_kinds.py): its logits, or refused by name."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sftjax import loading
from sftjax.errors import ConfigError
from sftjax.models import decoder
from sftjax.peft import merge
from sftjax.weights import hf, peft_format

GOLDEN = Path(__file__).parent.parent / "golden"
BASES = ("qwen2", "phi3", "qwen2_moe")
RUNTIME = decoder.Runtime(compute_dtype="float32", remat="none")


@functools.cache
def golden(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"peft_kinds_{family}.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(ModelFiles, params) by family."""

    @functools.cache
    def base(family: str):
        folder, arrays = tmp_path_factory.mktemp(family), golden(family)
        tensors = {
            name.removeprefix("base/"): value for name, value in arrays.items() if name.startswith("base/model.")
        }
        tensors |= {"lm_head.weight": arrays["base/lm_head.weight"]} if "base/lm_head.weight" in arrays else {}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(str(arrays["base/config.json"]))
        files = hf.open_model(folder)
        return files, hf.load_params(files, files.config, jnp.float32)

    return base


@functools.partial(jax.jit, static_argnums=0)
def logits(config, variables, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = decoder.hidden_states(config, RUNTIME, variables, tokens, positions, jnp.ones_like(tokens))
    return decoder.logits(config, RUNTIME, variables, hidden)


def write(folder: Path, family: str, kind: str) -> None:
    for name, value in golden(family).items():
        if name.startswith(f"{kind}/file/"):
            (folder / name.rpartition("/")[2]).write_bytes(value.tobytes())


KINDS = [(family, name.partition("/")[0]) for family in BASES for name in golden(family) if name.endswith("/logits")]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_it_computes_what_it_does_in_peft_or_is_refused(bases, tmp_path, family, kind):
    files, params = bases(family)
    arrays = golden(family)
    write(tmp_path, family, kind)
    read = functools.partial(loading.with_adapter, files.config, params, str(tmp_path), files.family.layout)
    if str(arrays[f"{kind}/refused"]):
        with pytest.raises(ConfigError, match=str(arrays[f"{kind}/refused"])):
            read()
        return
    config, params, adapter = read()
    variables = {"params": params, "adapter": jax.tree.map(jnp.asarray, adapter)}
    try:
        variables = {"params": merge.merge(params, variables["adapter"])}
    except ConfigError as error:  # as in PEFT
        assert "lora_bias" in str(error)
    np.testing.assert_allclose(logits(config, variables, arrays["tokens"]), arrays[f"{kind}/logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", BASES)
def test_what_was_read_is_written_as_peft_reads_it(bases, tmp_path, family):
    """Our own folder of each kind keeps the contract, and is the same adapter when it is read again."""
    files, _ = bases(family)
    layout = files.family.layout
    for _, kind in (pair for pair in KINDS if pair[0] == family):
        arrays = golden(family)
        rows = arrays[f"{kind}/logits"].shape[-1]
        if str(arrays[f"{kind}/refused"]):
            continue
        theirs, ours = tmp_path / kind, tmp_path / f"{kind}-again"
        theirs.mkdir()
        write(theirs, family, kind)
        config = peft_format.fitted_config(theirs, files.config.replace(vocab_size=rows))
        adapter, spec = peft_format.load_adapter(theirs, files.config.replace(vocab_size=rows), layout=layout)
        versions = peft_format.save_adapter(ours, adapter, spec, config, layout=layout)
        assert "5" in versions and peft_format.verify_folder(ours, config, layout=layout) == versions
        again, _ = peft_format.load_adapter(ours, config, layout=layout)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6, err_msg=kind)
        jax.tree.map(same, adapter, again)
