"""SmolLM2-135M-Instruct, every parameter trained, at the size of one small device: a base to start experiments from."""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/smollm2_135m"
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.02
    config.data.max_length = 2048
    config.train.batch_size = 16
    config.train.gradient_accumulation_steps = 1
    config.train.num_train_epochs = 2.0
    config.train.learning_rate = 1e-4
    config.train.warmup_ratio = 0.05
    config.train.weight_decay = 0.01
    config.eval.eval_steps = 200
    return config
