"""AlignProp: fine-tune a LoRA by backpropagating a reward through the denoising chain.

Prabhudesai, Goyal, Pathak & Fragkiadaki, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", 2023,
arXiv 2310.03739.

    repeat   draw prompts c, noise x_T ~ N(0, I), and K ~ U{1, ..., N}
             x_0 = DDIM(x_T, c) in N steps, keeping the gradient of the last K
             one AdamW step on the LoRA along the gradient of mean r(decode(x_0), c)

Its relatives are the same loop with another gradient plan, chosen by `plan.name`: draft_k and draft_lv (DRaFT), refl,
drtune, full (no truncation), stochastic_detach (below).

Where the authors' codes differ from the paper and from each other, this follows the paper:
- K is drawn once per trajectory. Their first code, and TRL's copy of it, draws at every step whether to cut that step:
  another, biased gradient. `plan.name: stochastic_detach` is that one.
- DDIM with eta 0. Their later code and TRL sample with eta 1 (`eta`) and guidance 5 instead of 7.5 (`guidance_scale`).
- The reward sees images in [0, 1]. Their later code denormalises twice and shows it half of the contrast.
- The loss is not multiplied by 0.01: at K = 1 that takes gradients down to where Adam's epsilon swallows them.
- Steps before the first kept one build no graph, and guidance is one batched call: the same gradient for less.
Ours besides: EMA, hinge loss, weighted sums, monitors and early stop, all off unless asked for.

    accelerate launch training/alignprop.py --config configs/alignprop/emoji.yaml
    torchrun --nproc_per_node 2 training/alignprop.py --config configs/alignprop/emoji.yaml
    python training/alignprop.py --config configs/alignprop/emoji.yaml --dry-run --random_init --shrink 4
"""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from alignkit.base import Base
from alignkit.config import command
from alignkit.data import Prompts
from alignkit.early_stop import diversity
from alignkit.reward_tuning import RewardTuningConfig, Validation, export, load_tuned, read_training_prompts
from alignkit.rewards import Combined, WeightedRewards, probe
from alignkit.run import Run
from alignkit.sampling import PLANS, GradientPlan, sample


@dataclass
class PlanConfig:
    """Which denoising steps keep their gradient (alignkit/sampling.py)."""

    name: str = "alignprop"
    """alignprop, full, stochastic_detach, draft_k, draft_lv, refl or drtune."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of that plan, such as {distribution: gaussian} for alignprop or {k: 1} for draft_k."""

    def draw(self, num_inference_steps: int, generator: torch.Generator) -> GradientPlan:
        if self.name not in PLANS:
            raise ValueError(f"plan.name: expected one of {', '.join(PLANS)}, got {self.name!r}")
        try:
            return PLANS[self.name](num_inference_steps, generator, **self.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"plan.settings of {self.name}: {error}") from error


@dataclass
class Config(RewardTuningConfig):
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The gradient plan."""
    detach_uncond: bool = False
    """Cut the gradient through the unconditional half of the guidance."""
    eta: float = 0.0
    """DDIM's noise in training: 0 is deterministic, 1 is DDPM's. Validation uses 0."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected 0 to 1, got {self.eta}")
        self.plan.draw(self.num_inference_steps, torch.Generator())


def train(cfg: Config) -> Path:
    """Runs or resumes the training. Returns its folder, with the LoRA and its card."""
    prompts, fixed = read_training_prompts(cfg)
    run = Run(cfg, "alignprop")
    base, lora, judges = load_tuned(run, cfg, prompts, fixed)
    base.vae.enable_gradient_checkpointing()  # as each denoising step: what is kept of a decoding is gigabytes
    probe_rewards(judges.rewards, base, cfg.resolution, prompts)

    state, best = {"validations": []}, {}
    run.prepare(lora, state, best)
    validation = Validation(run, cfg, base, lora, judges, fixed, state["validations"], best)

    stopped = None
    for step in run.steps():
        base.network.train()  # for the LoRA's dropout
        plan = cfg.plan.draw(cfg.num_inference_steps, run.generator(step, tag="plan"))
        measured = []
        for indices in run.micro_batches(step):
            rows = [run.shuffled(len(prompts), i // cfg.num_images_per_prompt, "prompts") for i in indices]
            batch = prompts.rows(rows)
            generators = [run.generator(step, i) for i in indices]
            images = generate(base, cfg, batch.prompts, generators, plan)
            scores = score_copies(judges.rewards, images, batch)
            run.backward(scores.loss, **scores.values)
            measured.append(judges.measure(images[: len(indices)].detach(), batch, scores))
        grad_norm = run.update()
        if cfg.optimizer != "adafactor":  # which has no epsilon of this size
            warn_if_adam_is_blind(grad_norm, lora, cfg.adam_epsilon)

        scalars = {name: torch.cat([part[name] for part in measured]) for name in measured[0]}
        scalars["diversity"] = diversity(run.gather(scalars.pop("features")))
        scalars |= {"grad_norm": grad_norm, "k": len(plan.steps)}
        run.log(step, **scalars, **validation.measure(step))
        stopped = validation.reason_to_stop(step)
        if stopped:
            break

    source = f"`training/alignprop.py` (AlignProp, arXiv 2310.03739; gradient plan {cfg.plan.name})"
    export(run, validation, "AlignProp", "alignprop", source, stopped)
    run.finish(stopped)
    return run.output_dir


def generate(
    base: Base,
    cfg: Config,
    prompts: list[str],
    generators: list[torch.Generator],
    plan: GradientPlan,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of B prompts with a generator each, with the plan's gradient; then its copies."""
    size = (cfg.resolution, cfg.resolution)
    x_T = randn_tensor((len(prompts), *base.latent_shape(*size)), generators, base.device)
    denoiser = base.denoiser(prompts, cfg.negative_prompt, cfg.guidance_scale, *size, cfg.detach_uncond)
    timesteps = base.timesteps(cfg.num_inference_steps, *size)
    return base.decode(sample(denoiser, x_T, base.schedule, timesteps, plan, eta=cfg.eta, generator=generators))


def score_copies(rewards: WeightedRewards, images: Tensor, batch: Prompts) -> Combined:
    """Scores of (1 + n) B images of B prompts, copies major; rewards and losses are the means over the copies, [B]."""
    copies = len(images) // len(batch)
    if not images.isfinite().all():  # no reward takes them; as a loss, they stop the run with the samples' numbers
        return Combined({}, images.reshape(copies, len(batch), -1).sum((0, 2)))
    columns = {name: values * copies for name, values in batch.columns.items()}
    scores = rewards(images, batch.prompts * copies, **columns)
    values = {name: value.view(copies, -1).mean(0) for name, value in scores.values.items()}
    return Combined(values, scores.loss.view(copies, -1).mean(0))


def probe_rewards(rewards: WeightedRewards, base: Base, resolution: int | None, prompts: Prompts) -> None:
    """Refuses a reward without gradient, on images of the size that will be trained on."""
    height, width = base.image_size(resolution, resolution)
    rows = prompts.rows([0, len(prompts) - 1])
    probe(rewards, rows.prompts, height=height, width=width, device=base.device, **rows.columns)


def warn_if_adam_is_blind(grad_norm: float, lora: dict[str, nn.Parameter], adam_epsilon: float) -> None:
    """Adam divides by sqrt(v) + epsilon: gradients of epsilon's size move nothing, and no curve says why."""
    rms = grad_norm / math.sqrt(sum(parameter.numel() for parameter in lora.values()))
    if rms < 10 * adam_epsilon:
        warnings.warn(
            f"the gradients are as small as adam_epsilon ({adam_epsilon:.1e}), so AdamW hardly moves: lower it, or "
            "raise the weights of the rewards",
            stacklevel=2,
        )


def main(argv: list[str] | None = None) -> None:
    command(Config, train, argv)


if __name__ == "__main__":
    main()
