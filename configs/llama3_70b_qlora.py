"""Llama-3-70B with LoRA beside a base of four bits: one GPU of 80 GB; `:v5e` for 16 chips of TPU v5e.

    python -m sftjax.main --config=configs/llama3_70b_qlora.py --config.model.path=DIR --config.data.train=chats.jsonl
"""

from sftjax.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.run_dir = "runs/llama3_70b_qlora"
    config.model.path = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.data.train = ("data/train.jsonl",)
    config.data.eval_fraction = 0.01
    config.data.max_length = 2048
    config.train.batch_size = 16
    config.train.gradient_accumulation_steps = 1 if arg == "v5e" else 16  # one sequence a device at a time
    config.train.num_train_epochs = 1.0
    config.train.learning_rate = 1e-4
    config.train.warmup_ratio = 0.03
    config.train.optim = "paged_adamw_8bit"
    config.peft.method = "lora"
    config.peft.quantization = "nf4"
    config.peft.r = 16
    config.peft.lora_alpha = 16.0
    config.peft.lora_dropout = 0.05
    config.eval.eval_steps = 100
    config.eval.num_samples = 0  # answers need a cache beside the weights
    config.checkpoint.save_steps = 50
    return config
