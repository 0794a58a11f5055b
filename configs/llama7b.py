"""Llama-2-7B, every parameter trained, on a TPU pod slice (or any devices whose number divides 64).

    python -m sftjax.main --config=configs/llama7b.py --config.model.path=DIR --config.data.train=chats.jsonl
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/llama7b"
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.model.chat_template = "llama2"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.01
    config.data.max_length = 4096
    # 512 x 4096 = 2.1 M tokens a step. Eight micro-batches of 64 sequences: one sequence a device on 64 devices.
    config.train.batch_size = 512
    config.train.gradient_accumulation_steps = 8
    config.train.num_train_epochs = 3.0
    config.train.learning_rate = 2e-5
    config.train.lr_scheduler_type = "cosine"
    config.train.warmup_ratio = 0.03
    config.train.weight_decay = 0.1
    config.train.adam_beta2 = 0.95
    config.eval.eval_steps = 50
    config.checkpoint.save_steps = 50
    return config
