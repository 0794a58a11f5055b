"""Runs the tiny models of `family_cases.py` in transformers (float32, eager) and stores what came out.

python tests/golden/make_families.py [case ...]       needs torch; writes tests/golden/families/<case>.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
import family_cases as cases


def model_of(case: str) -> transformers.PreTrainedModel:
    """The case's model, every weight set by its name."""
    raw = cases.raw_config(case)
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plus_one = "gemma" in raw["model_type"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(cases.values(name, tuple(parameter.shape), plus_one)))
    return model


def run(model: transformers.PreTrainedModel) -> dict[str, object]:
    """Per sequence alone: logits; over all: weighted nll, auxiliary loss, and the gradient of both."""
    nll, logits, router = 0.0, [], []
    fresh = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rotary = model.model.rotary_emb
    longest = getattr(rotary, "max_seq_len_cached", None)
    for ids, weights in zip(cases.sequences(), cases.loss_weights(), strict=True):
        # length-dependent RoPE remembers the longest sequence it saw; alone, a sequence meets a fresh model
        for name, buffer in fresh.items():
            model.get_buffer(name).data = buffer.clone()
        if longest is not None:
            rotary.max_seq_len_cached = longest
        tokens = torch.from_numpy(ids)[None]
        kwargs = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
        out = model(tokens, use_cache=False, **kwargs)
        losses = torch.nn.functional.cross_entropy(out.logits[0, :-1], tokens[0, 1:], reduction="none")
        nll = nll + (losses * torch.from_numpy(weights[:-1])).sum()
        logits.append(out.logits[0])
        router.append(getattr(out, "router_logits", None))
    moe_loss = torch.zeros(())
    if router[0] is not None:
        module = sys.modules[type(model).__module__]
        layers = tuple(torch.cat(parts) for parts in zip(*router, strict=True))
        experts = getattr(model, "num_experts", None) or model.config.num_local_experts
        moe_loss = module.load_balancing_loss_func(layers, experts, model.config.num_experts_per_tok)
    (nll + cases.AUX_WEIGHT * moe_loss).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return {
        "logits": [part.detach().numpy() for part in logits],
        "nll": float(nll.detach()),
        "moe_loss": float(moe_loss.detach()),
        "gradients": gradients,
    }


def greedy(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that follow the prompt, and by how much the best logit led each time."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack([step[0].topk(2).values for step in out.logits])
    return out.sequences[0, len(prompt) :].numpy(), (best[:, 0] - best[:, 1]).numpy()


def store(case: str) -> Path:
    """Logits at some positions, gradients at some entries (with their largest), losses, greedy continuations."""
    model = model_of(case)
    found = run(model)
    arrays = {"nll": np.float64(found["nll"]), "moe_loss": np.float64(found["moe_loss"])}
    for number, logits in enumerate(found["logits"]):
        arrays[f"logits_{number}"] = logits[cases.kept_positions(len(logits))]
    arrays["logit_scale"] = np.float32(max(np.abs(logits).max() for logits in found["logits"]))
    for name, gradient in found["gradients"].items():
        arrays[f"gradient/{name}"] = gradient.reshape(-1)[cases.kept_entries(name, gradient.size)]
        arrays[f"largest/{name}"] = np.abs(gradient).max()
    for number, prompt in enumerate(cases.prompts()):
        model = model_of(case)
        arrays[f"greedy_{number}"], arrays[f"lead_{number}"] = greedy(model, prompt, cases.NEW_TOKENS)
    path = Path(__file__).parent / "families" / f"{case}.npz"
    np.savez_compressed(path, **arrays)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for each in sys.argv[1:] or cases.CASES:
        written = store(each)
        print(f"{written.name}: {written.stat().st_size:,} bytes", flush=True)
