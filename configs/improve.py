"""Short training on short rows, such as a task's questions and answers, for `tools/improve.py`."""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/improve"
    config.model.path = ".cache/quickstart/SmolLM2-135M-Instruct"
    config.data.train = ("data/train.jsonl",)
    config.data.max_length = 512
    config.train.batch_size = 2
    config.train.num_train_epochs = 2.0
    config.train.learning_rate = 2e-4
    config.train.warmup_ratio = 0.1
    config.train.weight_decay = 0.01
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.export.dtype = "float32"  # the next step goes on from exactly what was trained
    config.export.checkpoint = "last"
    config.log.tensorboard = False
    return config
