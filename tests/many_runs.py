"""Several small runs in one process, which compiles once what they share: python -m tests.many_runs FILE.json

FILE.json: [{"run_dir": ..., FIELD: VALUE, ...}, ...], fields of the configuration over those of `tiny_run.settings`.
A run that ends with an error of the user's is left as it is; the last line printed says which did.
"""

import json
import signal
import sys
import time
from pathlib import Path

import jax


def main(path: str) -> None:
    from sftjax import config as config_lib
    from sftjax import train
    from sftjax.errors import UserError

    failed = {}
    for fields in json.loads(Path(path).read_text()):
        config = config_lib.defaults()
        stop_after = fields.pop("stop_after", 0)
        slow_rows = fields.pop("slow_rows", 0.0)
        config.update_from_flattened_dict({key: _plain(value) for key, value in fields.items()})
        began = time.process_time()
        with patched(train, stop_after, slow_rows):
            try:
                train.run(config)
            except UserError as error:
                failed[config.run_dir] = f"{type(error).__name__}: {error}"
        print(f"{config.run_dir}: {time.process_time() - began:.1f} s", file=sys.stderr)
    print(json.dumps(failed))


def _plain(value):
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value


class patched:
    """Asks a run to stop after some steps, as a preempted machine does; makes its rows slow to come."""

    def __init__(self, train, stop_after, slow_rows):
        self.train, self.stop_after, self.slow_rows = train, stop_after, slow_rows

    def __enter__(self):
        train, count = self.train, 0
        self.old = next_item = train.next_item

        def slower(items, pending, log):
            def slow():
                time.sleep(self.slow_rows)
                yield next(items)

            nonlocal count
            count += 1
            if self.stop_after and count == self.stop_after:
                signal.raise_signal(signal.SIGTERM)
            return next_item(slow() if self.slow_rows else items, pending, log)

        train.next_item = slower

    def __exit__(self, *_):
        self.train.next_item = self.old


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", sys.argv[2])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    main(sys.argv[1])
