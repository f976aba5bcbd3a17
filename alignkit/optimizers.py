"""Optimizers by name, for `Run`: at the config's learning rate, adam_beta1 and 2, adam_epsilon and weight decay."""

import importlib.util

import torch
from torch import nn

from alignkit.config import RunConfig

PACKAGES = {
    "adamw": "torch",
    "adamw_8bit": "bitsandbytes",
    "prodigy": "pytorch_optimizer",
    "adafactor": "pytorch_optimizer",
    "diffgrad": "pytorch_optimizer",
}


def check_optimizer(name: str) -> None:
    """ValueError for a name that is not known, or a library that is not there."""
    if name not in PACKAGES:
        raise ValueError(f"optimizer: expected one of {', '.join(PACKAGES)}, got {name!r}")
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise ValueError(
            f"optimizer {name} comes with {PACKAGES[name]}, which is missing: pip install {PACKAGES[name]}"
        )


def make_optimizer(cfg: RunConfig, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer `cfg.optimizer`, with weight decay decoupled from the gradient in all of them.

    adamw_8bit: AdamW with moments in 8 bits, those of parameters below 4,096 numbers in 32 (Dettmers et al. 2022, arXiv
    2110.02861). prodigy: AdamW that finds its own learning rate, a factor of which is cfg.learning_rate, usually 1
    (Mishchenko & Defazio 2024, arXiv 2306.06101).
    adafactor: second moments as row and column means, no first moment and no epsilon of the config's, at its learning
    rate (Shazeer & Stern 2018, arXiv 1804.04235). diffgrad: Adam that slows down where gradients stay the same (Dubey
    et al. 2020, arXiv 1909.11015). Raises as `check_optimizer`.
    """
    check_optimizer(cfg.optimizer)
    common = {"lr": cfg.learning_rate, "weight_decay": cfg.adam_weight_decay}
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(params, betas=betas, eps=cfg.adam_epsilon, **common)
    if cfg.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, betas=betas, eps=cfg.adam_epsilon, **common)
    import pytorch_optimizer

    if cfg.optimizer == "prodigy":
        return pytorch_optimizer.Prodigy(params, betas=betas, eps=cfg.adam_epsilon, **common)
    if cfg.optimizer == "diffgrad":
        return pytorch_optimizer.DiffGrad(params, betas=betas, eps=cfg.adam_epsilon, **common)
    # A LoRA begins at 0, and a step in proportion to the weights would leave it there.
    betas = (None, cfg.adam_beta2)
    return pytorch_optimizer.AdaFactor(params, betas=betas, scale_parameter=False, relative_step=False, **common)
