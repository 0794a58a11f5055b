"""Plans a run before it is paid for: memory, kernels, exchanged bytes, and a floor on its time, compiled for devices
that needn't be here.

    python tools/plan.py --config=configs/llama7b.py --topology=v5e:4x4
    python tools/plan.py --config=configs/llama3_8b_lora.py --topology=h100:1 --preflight=RUN/preflight.json --price=3

Topologies: TPU slices (v5e:4x4, v5p:2x2x4, v6e:8x8), GPUs (h100:8, a6000, gpu), cpu. Any field can be set as in
training: --config.train.batch_size=64. Of the model's folder only config.json is read.

Several topologies, with commas, are compared at the same work a device; --out then also gets a plot, OUT.svg.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags, logging

from sftjax import config_file
from sftjax.errors import ConfigError, StorageError, exit_with_message

_TOPOLOGY = flags.DEFINE_string("topology", "", "What to plan for: v5e:4x4, v5p:2x2x4, h100:8, gpu, cpu; or several.")
_OUT = flags.DEFINE_string("out", "", "JSON to write.")
_PREFLIGHT = flags.DEFINE_string("preflight", "", "A run's preflight.json: the plan then tells tokens and hours.")
_PRICE = flags.DEFINE_float("price", None, "Of a device and hour (a tpu7x chip is two devices); with --preflight.")
_SEARCH = flags.DEFINE_bool("search", False, "Try micro-batches, remat and meshes; name the fastest that fits.")


def main(argv: list[str]) -> int:
    config = config_file.read()
    if config is None or not _TOPOLOGY.value or len(argv) > 1:
        raise ConfigError("give --config=configs/NAME.py and --topology=v5e:4x4 (or another)")
    logging.set_verbosity(logging.WARNING)
    # after the flags, so that mistakes answer at once
    from sftjax import plan, plan_fit, plan_scaling, plan_search, topology

    if "," in _TOPOLOGY.value:
        plans = plan_scaling.weak(config, _TOPOLOGY.value.split(","))
        print(plan_scaling.table(plans))
        if _OUT.value:
            write(_OUT.value, json.dumps(plans, indent=2))
            write(f"{_OUT.value.removesuffix('.json')}.svg", plan_scaling.plot(plans))
        return 0
    target = topology.find(_TOPOLOGY.value)
    preflight = read_json(_PREFLIGHT.value) if _PREFLIGHT.value else None
    make, describe = (plan_search.search, plan_search.describe) if _SEARCH.value else (plan.make, plan.describe)
    result = make(config, target, preflight=preflight, price=_PRICE.value)
    print(describe(result))
    if not result["memory"]["fits"]:
        print(f"  remedy      {plan_fit.advice(config, target)}")
    if _OUT.value:
        write(_OUT.value, json.dumps(result, indent=2))
    return 0 if result["memory"]["fits"] else plan.DoesNotFit.exit_code


def write(path: str, text: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror})") from error


def read_json(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read as JSON ({error})") from error


if __name__ == "__main__":
    exit_with_message(lambda: config_file.run(main))
