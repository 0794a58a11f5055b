"""Gemma 3 270M, a *base* model, made into an assistant with the built-in Gemma template.

A base model doesn't stop: compare the stop rate and the answers before and after in the run's `report.html`.
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/gemma3_270m_base"
    config.model.path = "google/gemma-3-270m"
    config.model.chat_template = "gemma"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.02
    config.data.max_length = 1024
    config.train.batch_size = 8
    config.train.num_train_epochs = 1.0
    config.train.learning_rate = 5e-5
    config.train.warmup_ratio = 0.05
    config.eval.num_samples = 8
    return config
