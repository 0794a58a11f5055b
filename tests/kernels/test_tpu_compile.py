"""The real training step, compiled for TPUs that aren't here: its kernels, and what its devices exchange.

Needs libtpu (the extra `tpu`). The five compiles take about eight minutes of a core.
"""

import importlib.util
import os

import pytest

from sftjax import plan, topology
from sftjax.config import defaults

if importlib.util.find_spec("libtpu") is None and not os.environ.get("CI"):
    pytest.skip("libtpu isn't installed: pip install 'sftjax[tpu]'", allow_module_level=True)

pytestmark = pytest.mark.nightly
MIB = 2**20


def settings(model, method, length):
    config = defaults()
    config.model.path = model
    config.data.train = ("unread.jsonl",)
    config.data.max_length = length
    config.train.batch_size = 8
    config.peft.method = "lora" if method == "nf4" else method
    config.peft.quantization = "nf4" if method == "nf4" else "none"
    return config


@pytest.fixture(
    scope="module",
    params=[
        ("Llama-2-7b", "none", 2048, "v5e:2x4"),
        ("Llama-2-7b", "none", 4096, "v5p:2x2x2"),
        ("Llama-3-8B", "lora", 4096, "v5e:2x4"),
        ("Llama-3-8B", "lora", 4096, "v5p:2x2x2"),
        ("Llama-3-8B", "nf4", 2048, "v5e:2x4"),
    ],
    ids=lambda case: "-".join(map(str, case[:3])) + "-" + case[3].replace(":", "-"),
)
def compiled(request):
    """(step, what the compiler says of it)"""
    model, method, length, name = request.param
    step = plan.settle(settings(model, method, length), topology.find(name))
    return step, plan.read(step, plan.compile_step(step))


def exchanged(compiled, kind=None):
    """(dtype, shape without leading ones, collective) of everything that isn't small."""
    for one in compiled[1]["collectives"]:
        for dtype, shape in one["arrays"]:
            squeezed = tuple(size for size in shape if size != 1)
            if kind in (None, one["kind"]) and len(squeezed) > 1:
                yield dtype, squeezed, one


def test_it_fits_and_runs_splash_in_both_passes(compiled):
    step, found = compiled
    assert found["bytes"]["peak"] <= step.target.chip.memory
    assert any("splash" in name and "fwd" in name for name in found["kernels"])
    assert any("splash" in name and ("dkv" in name or "bwd" in name) for name in found["kernels"])


def test_only_the_weights_of_one_layer_are_gathered_at_a_time(compiled):
    """In the compute type, or as codes. Stacked parameters, float32 optimizer state and dequantised weights never.

    The embedding's gradient may come from all rows' gradients, where that is less than summing the table.
    """
    config, frozen = compiled[0].program.config, compiled[0].program.abstract_frozen
    table = 4 * config.vocab_size * config.hidden_size
    for dtype, shape, one in exchanged(compiled, "all-gather"):
        if "embed_tokens" in one["source"] and one["received"] < table:
            continue
        assert len(shape) == 2, one
        assert dtype in ("bf16", "u8"), one
        assert dtype == "u8" or config.hidden_size in shape, one
        if "quant" in frozen and one["times"] > 1:
            assert dtype == "u8" or min(shape) <= 16, one  # the adapters' rank


def test_logits_are_not_exchanged(compiled):
    """What has the vocabulary as one size has the model's width as the other: the table, the head, their gradients."""
    config = compiled[0].program.config
    for _, shape, one in exchanged(compiled):
        if config.vocab_size in shape:
            assert set(shape) <= {config.vocab_size, config.hidden_size}, one


def test_gradients_of_layers_are_not_summed_whole(compiled):
    """Each device receives the sum of its own part; only what is small (norms, adapters) is kept by all."""
    for _, shape, one in exchanged(compiled, "all-reduce"):
        if one["times"] > 1:
            assert one["received"] / one["times"] < 16 * MIB, (shape, one)


def test_what_is_exchanged_is_about_what_the_rule_says(compiled):
    """Gathers twice a micro-batch and one reduction: the plan's estimate for targets that can't be compiled."""
    step, found = compiled
    assert found["network_bytes"] == pytest.approx(plan.costs.network_bytes(step.program, **step.shape), rel=0.3)


def test_memory_by_rule_is_near_the_compilers(compiled):
    step, found = compiled
    assert step.memory().peak == pytest.approx(found["bytes"]["peak"], rel=0.15)
