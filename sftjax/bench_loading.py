"""How fast weights are loaded, beside merely reading the same files into memory; in processes of their own.

python tools/bench.py --load --model DIR
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import jax

from sftjax.bench import run
from sftjax.errors import ConfigError
from sftjax.weights import hf


def compare(*, model: str, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Loads a Hugging Face folder in its files' dtype, and reads its files; the best of some rounds, all cached.

    Returns:
      {"read": {"seconds"}, "load": {"seconds", "bytes" of the arrays, "peak_bytes" of the process}}, and "ratio".
    """

    def best(what: str) -> dict[str, float]:
        rounds = [json.loads(run([sys.executable, __file__, model, what])[0].splitlines()[-1]) for _ in range(repeats)]
        return min(rounds, key=lambda found: found["seconds"])

    best("read")  # so that the files are cached
    result = {"read": best("read"), "load": best("load")}
    return {**result, "ratio": result["load"]["seconds"] / result["read"]["seconds"]}


def read(model: str) -> dict[str, float]:
    """All at once in memory, as a loaded model is; the second time, when the process has its memory already."""
    paths = sorted(Path(model).glob("*.safetensors"))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        files = [path.read_bytes() for path in paths]
        seconds.append(time.perf_counter() - start)
        del files
    return {"seconds": min(seconds)}


def load(model: str) -> dict[str, float]:
    opened = hf.open_model(model)
    dtypes = hf.stored_dtypes(opened)
    if not isinstance(dtypes, str):
        raise ConfigError(f"{model}: its tensors are of several dtypes; what is compared is loading as stored")
    jax.devices()  # starting a backend is no part of it
    start = time.perf_counter()
    params = jax.block_until_ready(hf.load_params(opened, opened.config, dtypes))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "peak_bytes": peak}


if __name__ == "__main__":
    print(json.dumps({"read": read, "load": load}[sys.argv[2]](sys.argv[1])))
