"""Llama-3-8B with LoRA on all seven projections: one 80 GB GPU, or a handful of TPU chips.

    python -m sftjax.main --config=configs/llama3_8b_lora.py --config.model.path=DIR --config.data.train=chats.jsonl
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/llama3_8b_lora"
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.01
    config.data.max_length = 4096
    config.train.batch_size = 16
    config.train.gradient_accumulation_steps = 2
    config.train.num_train_epochs = 2.0
    config.train.learning_rate = 2e-4
    config.train.warmup_ratio = 0.03
    config.peft.method = "lora"
    config.peft.r = 16
    config.peft.lora_alpha = 32.0
    config.peft.lora_dropout = 0.05
    config.peft.target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.eval.eval_steps = 100
    return config
