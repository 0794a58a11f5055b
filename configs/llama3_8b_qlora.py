"""Llama-3-8B with LoRA beside a base of four bits (QLoRA): one GPU of 16 GB.

    python -m sftjax.main --config=configs/llama3_8b_qlora.py --config.model.path=DIR --config.data.train=chats.jsonl

A T4 wants --config.model.compute_dtype=float16 as well.
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/llama3_8b_qlora"
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.01
    config.data.max_length = 2048
    # One sequence at a time: what is left beside the weights goes to activations.
    config.train.batch_size = 16
    config.train.gradient_accumulation_steps = 16
    config.train.num_train_epochs = 2.0
    config.train.learning_rate = 2e-4
    config.train.warmup_ratio = 0.03
    config.train.optim = "paged_adamw_8bit"
    config.peft.method = "lora"
    config.peft.quantization = "nf4"
    config.peft.r = 16
    config.peft.lora_alpha = 32.0
    config.peft.lora_dropout = 0.05
    config.eval.eval_steps = 100
    config.checkpoint.save_steps = 100
    return config
