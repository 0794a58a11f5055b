"""The quickstart: SmolLM2-135M-Instruct learns from human small talk on two CPU cores in about ten minutes.

`tools/quickstart.sh` puts the model and the two data files where this file looks for them.
"""

from sftjax.config import defaults

FOLDER = ".cache/quickstart"


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/quickstart"
    config.model.path = f"{FOLDER}/SmolLM2-135M-Instruct"
    config.data.train = (f"{FOLDER}/chitchat/train.jsonl",)
    config.data.eval = (f"{FOLDER}/chitchat/held_out.jsonl",)
    config.data.max_eval_rows = 30
    config.data.max_length = 1024
    config.data.over_length = "split"  # human dialogues are long; this way each of their turns counts
    config.train.batch_size = 2
    config.train.max_steps = 60
    config.train.learning_rate = 3e-4
    config.train.warmup_ratio = 0.1
    config.peft.method = "lora"
    config.peft.r = 16
    config.peft.lora_alpha = 32.0
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.eval.eval_steps = 30
    config.export.merge = True
    config.export.dtype = "float32"  # the export then answers as the model in memory did
    return config
