"""Llama-2-7B with LoRA on all seven projections: one 24 GB GPU, or a TPU host.

    python -m sftjax.main --config=configs/llama7b_lora.py --config.model.path=DIR --config.data.train=chats.jsonl
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/llama7b_lora"
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.model.chat_template = "llama2"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.01
    config.data.max_length = 2048
    config.train.batch_size = 64
    config.train.gradient_accumulation_steps = 16  # four sequences at a time
    config.train.num_train_epochs = 3.0
    config.train.learning_rate = 2e-4
    config.train.warmup_ratio = 0.03
    config.peft.method = "lora"
    config.peft.r = 16
    config.peft.lora_alpha = 32.0
    config.peft.lora_dropout = 0.05
    config.eval.eval_steps = 100
    config.checkpoint.save_steps = 100
    return config
