"""Llama-2-7B, every parameter trained with little memory: bfloat16 weights rounded stochastically, 8-bit moments.

    python -m sftjax.main --config=configs/llama7b_8bit_full.py --config.model.path=DIR --config.data.train=chats.jsonl
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/llama7b_8bit_full"
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.model.chat_template = "llama2"
    config.model.params_dtype = "bfloat16"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.01
    config.data.max_length = 2048
    config.train.batch_size = 64
    config.train.gradient_accumulation_steps = 8
    config.train.num_train_epochs = 3.0
    config.train.learning_rate = 2e-5
    config.train.warmup_ratio = 0.03
    config.train.weight_decay = 0.1
    config.train.adam_beta2 = 0.95
    config.train.optim = "adamw_8bit"
    config.eval.eval_steps = 50
    config.checkpoint.save_steps = 200
    return config
