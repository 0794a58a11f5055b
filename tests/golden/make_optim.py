"""Makes optim.npz: parameters after each of seven steps of torch's AdamW, and transformers' schedules. Needs torch.

python tests/golden/make_optim.py
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.optimization import get_wsd_schedule

STEPS = 7


def schedules() -> dict[str, np.ndarray]:
    def rates(make):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
        scheduler = make(optimizer)
        found = []
        for _ in range(24):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return np.array(found)

    return {
        "cosine": rates(lambda o: transformers.get_cosine_schedule_with_warmup(o, 3, 20)),
        "cosine_no_warmup": rates(lambda o: transformers.get_cosine_schedule_with_warmup(o, 0, 20)),
        "linear": rates(lambda o: transformers.get_linear_schedule_with_warmup(o, 3, 20)),
        "constant": rates(lambda o: transformers.get_constant_schedule_with_warmup(o, 3)),
        "wsd": rates(lambda o: get_wsd_schedule(o, 3, 5, num_training_steps=20, min_lr_ratio=0.1)),
    }


def main():
    torch.manual_seed(0)
    arrays = {f"schedule/{name}": value for name, value in schedules().items()}
    start = {"weight": torch.randn(6, 8), "bias": torch.randn(6)}
    gradients = {name: 3 * torch.randn(STEPS, *value.shape) for name, value in start.items()}
    gradients["weight"][2] *= 1e-3  # a step that isn't clipped
    gradients["bias"][2] *= 1e-3
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(
        [
            dict(params=[parameters["weight"]], weight_decay=0.1),
            dict(params=[parameters["bias"]], weight_decay=0.0),
        ],
        lr=1e-2,
    )
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    after = {name: [] for name in start}
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        scheduler.step()
        for name, parameter in parameters.items():
            after[name].append(parameter.detach().numpy().copy())
    for name in start:
        arrays |= {
            f"{name}/start": start[name].numpy(),
            f"{name}/gradients": gradients[name].numpy(),
            f"{name}/after": np.stack(after[name]),
        }
    arrays["version"] = np.array(torch.__version__)
    np.savez_compressed(Path(__file__).with_name("optim.npz"), **arrays)


if __name__ == "__main__":
    main()
