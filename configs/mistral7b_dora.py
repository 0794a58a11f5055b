"""Mistral-7B with DoRA: LoRA that learns the length of each weight row apart from its direction.

    python -m sftjax.main --config=configs/mistral7b_dora.py --config.model.path=DIR --config.data.train=chats.jsonl
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/mistral7b_dora"
    config.model.path = "mistralai/Mistral-7B-v0.1"
    config.model.chat_template = "mistral"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.01
    config.data.max_length = 2048
    config.train.batch_size = 32
    config.train.gradient_accumulation_steps = 4
    config.train.num_train_epochs = 2.0
    config.train.learning_rate = 1e-4
    config.train.warmup_ratio = 0.05
    config.peft.method = "dora"
    config.peft.r = 16
    config.peft.lora_alpha = 32.0
    config.peft.lora_dropout = 0.05
    config.eval.eval_steps = 100
    config.checkpoint.save_steps = 100
    return config
