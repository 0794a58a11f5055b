"""Two processes with four devices each: half of the bytes are read by each, and the export is one whole folder."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax import tree
from sftjax.weights import hf, rules

WORKER = textwrap.dedent("""
    import json, sys
    import jax
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
    import jax.numpy as jnp
    from sftjax import tree
    from sftjax.parallel import mesh as meshes, partition
    from sftjax.weights import export, hf, load, rules
    model = hf.open_model(sys.argv[3])
    mesh = meshes.make({"data": 1, "fsdp": 8, "tensor": 1, "context": 1, "expert": 1})
    shapes = rules.leaf_shapes(model.config)
    abstract = tree.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in shapes.items()})
    shardings = partition.shardings({"params": abstract}, mesh)["params"]
    source, table = hf.open_source(model)
    before = source.bytes_read
    params, _ = load.load(source, table, shapes, "bfloat16", shardings)
    read = source.bytes_read - before
    export.export_model(sys.argv[4], model.config, params, dtype="bfloat16", source=model, shard_bytes=400_000)
    print(json.dumps({"read": read}))
""")


def test_two_processes(tmp_path):
    raw = tiny.config_dict("llama", hidden_size=256, intermediate_size=512, vocab_size=512)
    tensors = tiny.random_tensors(raw)
    folder = tiny.write_model(tmp_path / "in", raw, tensors, files=2)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": str(Path(hf.__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(port), str(folder), str(tmp_path / "out")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    total = sum(array.nbytes for array in tensors.values())
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert worker.returncode == 0, err[-3000:]
        assert json.loads(out.splitlines()[-1])["read"] <= 0.55 * total
    model, again = hf.open_model(folder), hf.open_model(tmp_path / "out")
    assert again.config == model.config and len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    before, after = (tree.flatten(hf.load_params(m, m.config, "float32")) for m in (model, again))
    assert set(after) == set(rules.leaf_shapes(model.config))
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf)
