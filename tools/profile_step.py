"""Where the time of a training step goes, by part of the model, beside the speed of this machine's matrix products.

    python tools/profile_step.py --config=configs/quickstart.py --steps=3

Any field can be set as in training. A few steps of the run are traced as it would begin; nothing is kept of it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags, logging

from sftjax import config_file
from sftjax.errors import ConfigError, StorageError, exit_with_message

_STEPS = flags.DEFINE_integer("steps", 3, "Steps to trace.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "JSON to write.")


def main(argv: list[str]) -> int:
    config = config_file.read()
    if config is None or len(argv) > 1:
        raise ConfigError("give --config=configs/NAME.py")
    logging.set_verbosity(logging.WARNING)
    from sftjax import step_profile  # after the flags, so that mistakes answer at once

    result = step_profile.profile(config, _STEPS.value)
    print(step_profile.describe(result))
    if _OUT.value:
        try:
            Path(_OUT.value).write_text(json.dumps(result, indent=2))
        except OSError as error:
            raise StorageError(f"{_OUT.value}: can't be written ({error})") from error
    return 0


if __name__ == "__main__":
    exit_with_message(lambda: config_file.run(main))
