"""transformers' own models in and out: what it saves is read, what is written it loads, nothing changes."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
import tiny  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from sftjax.weights import export, hf  # noqa: E402

pytestmark = pytest.mark.parity


def saved(folder, name, **options):
    """A random model as transformers saves it."""
    torch.manual_seed(0)
    kind, extra = tiny.FAMILIES[name]
    config = getattr(transformers, kind)(**{**tiny.SIZES, **extra, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def settings(config):
    """What it says, without transformers 4's spelling of what `rope_parameters` has as well."""
    found = config.to_diff_dict()
    rope = {key: value for key, value in found.get("rope_parameters", {}).items() if key != "type"}
    if rope.get("rope_type") == "yarn":
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | rope  # what they are where nothing is said
    return {
        key: value for key, value in found.items() if key not in ("transformers_version", "partial_rotary_factor")
    } | {"rope_parameters": rope}  # fmt: skip


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_there_and_back(tmp_path, name):
    theirs = saved(tmp_path / "in", name)
    model = hf.open_model(tmp_path / "in")
    params = hf.load_params(model, model.config, "bfloat16")
    export.export_model(tmp_path / "out", model.config, params, dtype="bfloat16", source=model, shard_bytes=100_000)
    before = load_file(tmp_path / "in" / "model.safetensors")
    after = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        after |= load_file(file)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert settings(again.config) == settings(theirs.config)
    tokens = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_configuration_written_without_a_source_is_the_same_model(tmp_path, name):
    theirs = saved(tmp_path / "in", name)
    model = hf.open_model(tmp_path / "in")
    params = hf.load_params(model, model.config, "bfloat16")
    export.export_model(tmp_path / "out", model.config, params, dtype="bfloat16")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    tokens = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits)


def test_mxfp4_is_dequantised_as_transformers_does():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from sftjax.weights import mxfp4

    blocks = torch.randint(0, 256, (2, 6, 4, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (2, 6, 4), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, columns, rows]
    for expert in range(2):
        ours = mxfp4.dequantise(blocks[expert].numpy(), scales[expert].numpy())
        torch.testing.assert_close(torch.from_numpy(ours).T, theirs[expert], rtol=0, atol=0)
