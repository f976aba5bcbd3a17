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

from alignkit.artifacts import LORA_WEIGHTS, read_events, save_lora, save_strip, write_card
from alignkit.base import Base, add_lora
from alignkit.config import LoraConfig, RunConfig, command, to_dict
from alignkit.data import Prompts, read_prompts
from alignkit.early_stop import (
    EarlyStopConfig,
    coarse_features,
    diversity,
    gains,
    keep_best,
    monitor_scores,
    reason_to_stop,
    restore_best,
)
from alignkit.rewards import Combined, RewardConfig, WeightedRewards, combine, probe
from alignkit.rewards.clip import Encoder
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
class Config(RunConfig):
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter that is trained."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """What is optimised: a weighted sum."""
    monitors: list[RewardConfig] = field(default_factory=list)
    """Logged beside it, never optimised; weight and loss have no effect. The first with a CLIP measures diversity."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The gradient plan."""
    prompt_file: str = ""
    """Prompts to train on: .txt, one a line, or .jsonl with `prompt` and columns for the rewards."""
    negative_prompt: str = ""
    """For classifier-free guidance."""
    num_images_per_prompt: int = 1
    """Consecutive samples that share a prompt."""
    num_inference_steps: int = 50
    """N, the denoising steps."""
    guidance_scale: float = 7.5
    """Of classifier-free guidance; 1 turns it off."""
    detach_uncond: bool = False
    """Cut the gradient through the unconditional half of the guidance."""
    eta: float = 0.0
    """DDIM's noise in training: 0 is deterministic, 1 is DDPM's. Validation uses 0."""
    resolution: int | None = None
    """Side of the images in pixels; null is the base's own."""
    validation_prompt_file: str | None = None
    """Prompts of the validation, same format; null takes those of prompt_file."""
    num_validation_images: int = 16
    """Image i is of validation prompt i (starting over at the end) and seed i."""
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig, metadata={"free": True})
    """When to end a run that exploits its reward."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_images_per_prompt", "num_inference_steps", "num_validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected 0 to 1, got {self.eta}")
        if not self.rewards:
            raise ValueError("rewards: expected at least one reward, got none")
        if not self.prompt_file:
            raise ValueError("prompt_file: expected a .txt or .jsonl file, got none")
        if self.validation_steps % self.logging_steps:
            raise ValueError(
                f"validation_steps: expected a multiple of logging_steps ({self.logging_steps}), as its results are "
                f"logged with the others, got {self.validation_steps}"
            )
        self.plan.draw(self.num_inference_steps, torch.Generator())


def train(cfg: Config) -> Path:
    """Runs or resumes the training. Returns its folder, with the LoRA and its card."""
    prompts = read_prompts(cfg.prompt_file)
    fixed = read_prompts(cfg.validation_prompt_file) if cfg.validation_prompt_file else prompts
    fixed = fixed.rows([i % len(fixed) for i in range(cfg.num_validation_images)])

    run = Run(cfg, "alignprop")
    base = run.load_base()
    base.check_prompts([*prompts.prompts, *fixed.prompts, cfg.negative_prompt])
    alpha = cfg.lora.rank if cfg.lora.alpha is None else cfg.lora.alpha
    lora = add_lora(base.network, cfg.lora.rank, alpha, cfg.lora.target_modules, cfg.lora.dropout, cfg.seed)
    judges = Judges(combine(cfg.rewards), combine(cfg.monitors) if cfg.monitors else None).to(run.device)
    probe_rewards(judges.rewards, base, cfg.resolution, prompts)

    state, best = {"validations": []}, {}
    run.prepare(lora, state, best)
    with run.first_validation():
        validation = Validation(cfg, base, judges, fixed)
    if run.position == 0:
        run.show(0, "base", validation.base_images, fixed.prompts)

    stopped, shown = None, None
    for step in run.steps():
        base.network.train()  # for the LoRA's dropout
        plan = cfg.plan.draw(cfg.num_inference_steps, run.generator(step, tag="plan"))
        measured = []
        for indices in run.micro_batches(step):
            batch = prompts.rows([choose_prompt(run, len(prompts), i, cfg.num_images_per_prompt) for i in indices])
            generators = [run.generator(step, i) for i in indices]
            images = generate(base, cfg, batch.prompts, generators, plan, cfg.eta)
            scores = score_copies(judges.rewards, images, batch)
            run.backward(scores.loss, **scores.values)
            measured.append(judges.measure(images[: len(indices)].detach(), batch, scores))
        grad_norm = run.update()
        warn_if_adam_is_blind(grad_norm, lora, cfg.adam_epsilon)

        scalars = {name: torch.cat([part[name] for part in measured]) for name in measured[0]}
        scalars["diversity"] = diversity(run.gather(scalars.pop("features")))
        scalars |= {"grad_norm": grad_norm, "k": len(plan.steps)}
        shown = None
        if run.every(cfg.validation_steps, step) and not cfg.dry_run:
            with run.averaged():
                shown, validated, summary = validation.measure(lora)
                state["validations"].append(summary | {"step": step + 1})
                keep_best([validation.start, *state["validations"]], cfg.early_stop, lora, best)
            run.show(step, "validation", shown, fixed.prompts)
            scalars |= validated
        run.log(step, **scalars)
        if shown is not None:
            reason = reason_to_stop([validation.start, *state["validations"]], cfg.early_stop)
            if run.gather(torch.tensor([int(reason is not None)], device=run.device)).any():
                stopped = f"stopped early after {step + 1} steps: {reason}"
                break

    with run.averaged():
        history = [validation.start, *state["validations"]]
        kept = restore_best(history, cfg.early_stop, lora, best) if stopped else None
        if kept:
            stopped += f"; the LoRA is that of step {kept}, the best by its validation"
        shown = validation.draw() if kept or shown is None else shown
        if run.is_main:
            export(run, cfg, base, fixed, validation.base_images, shown, stopped)
    run.finish(stopped)
    return run.output_dir


def generate(
    base: Base,
    cfg: Config,
    prompts: list[str],
    generators: list[torch.Generator],
    plan: GradientPlan | None,
    eta: float = 0.0,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of B prompts with a generator each, with the plan's gradient; then its copies.

    Without a plan, the pixels of the stock pipeline for the same prompts and generators.
    """
    size = (cfg.resolution, cfg.resolution)
    x_T = randn_tensor((len(prompts), *base.latent_shape(*size)), generators, base.device)
    denoiser = base.denoiser(prompts, cfg.negative_prompt, cfg.guidance_scale, *size, cfg.detach_uncond)
    timesteps = base.timesteps(cfg.num_inference_steps, *size)
    return base.decode(sample(denoiser, x_T, base.schedule, timesteps, plan, eta=eta, generator=generators))


def score_copies(rewards: WeightedRewards, images: Tensor, batch: Prompts) -> Combined:
    """Scores of (1 + n) B images of B prompts, copies major; rewards and losses are the means over the copies, [B]."""
    copies = len(images) // len(batch)
    if not images.isfinite().all():  # no reward takes them; as a loss, they stop the run with the samples' numbers
        return Combined({}, images.reshape(copies, len(batch), -1).sum((0, 2)))
    columns = {name: values * copies for name, values in batch.columns.items()}
    scores = rewards(images, batch.prompts * copies, **columns)
    values = {name: value.view(copies, -1).mean(0) for name, value in scores.values.items()}
    return Combined(values, scores.loss.view(copies, -1).mean(0))


def choose_prompt(run: Run, num_prompts: int, index: int, num_images_per_prompt: int) -> int:
    """Of a sample, by its global index: every prompt once in each epoch, in a seeded order."""
    epoch, position = divmod(index // num_images_per_prompt, num_prompts)
    return int(torch.randperm(num_prompts, generator=run.generator(epoch, tag="prompts"))[position])


class Judges(nn.Module):
    """What is optimised, and what watches it."""

    def __init__(self, rewards: WeightedRewards, monitors: WeightedRewards | None):
        super().__init__()
        self.rewards, self.monitors = rewards, monitors
        encoders = [getattr(monitor, "encoder", None) for monitor in monitors.rewards] if monitors else []
        self.encoder = next((encoder for encoder in encoders if isinstance(encoder, Encoder)), None)

    @torch.no_grad()
    def measure(self, images: Tensor, batch: Prompts, scores: Combined | None = None) -> dict[str, Tensor]:
        """loss, reward/*, monitor/* [B] and features [B, D] of images; `scores` are the rewards', if they are known."""
        scores = self.rewards(images, batch.prompts, **batch.columns) if scores is None else scores
        measured = {"loss": scores.loss.detach()}
        measured |= {f"reward/{label}": value.detach() for label, value in scores.values.items()}
        if self.monitors:
            values = self.monitors(images, batch.prompts, **batch.columns).values
            measured |= {f"monitor/{label}": value for label, value in values.items()}
        return measured | {"features": self.features(images)}

    def features(self, images: Tensor) -> Tensor:
        """[B, D], whose distances say how different images are: CLIP's of a monitor, else the RMS of coarse pixels."""
        if self.encoder:
            return self.encoder.embed_images(images)
        return coarse_features(images)


class Validation:
    """Fixed prompts and seeds: what the base draws of them, and what the LoRA makes of that."""

    def __init__(self, cfg: Config, base: Base, judges: Judges, prompts: Prompts):
        self.cfg, self.base, self.judges, self.prompts = cfg, base, judges, prompts
        base.network.disable_adapters()
        self.base_images = self.draw()
        base.network.enable_adapters()
        self.base_measured = judges.measure(self.base_images, prompts)
        self.start = self.summary(self.base_measured)

    @torch.no_grad()
    def draw(self) -> Tensor:
        self.base.network.eval()
        images, size = [], self.cfg.train_batch_size
        for first in range(0, len(self.prompts), size):
            prompts = self.prompts.prompts[first : first + size]
            generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
            images.append(generate(self.base, self.cfg, prompts, generators, None))
        return torch.cat(images)

    def measure(self, lora: dict[str, nn.Parameter]) -> tuple[Tensor, dict[str, Tensor | float], dict[str, Any]]:
        """Images, what to log of them, and what an early stop is decided by."""
        images = self.draw()
        measured = self.judges.measure(images, self.prompts)
        summary = self.summary(measured)
        del measured["features"]
        scalars = {f"validation/{name}": value for name, value in measured.items()}
        scalars |= {
            "validation/diversity": summary["diversity"],
            "drift/images": (images - self.base_images).square().mean((1, 2, 3)).sqrt(),
            "drift/lora_norm": lora_norm(lora, self.cfg.lora),
        }
        return images, scalars, summary

    def summary(self, measured: dict[str, Tensor]) -> dict[str, Any]:
        """As alignkit/early_stop.py has it, from the base on."""
        return {
            "reward": -float(measured["loss"].mean()),
            "diversity": diversity(measured["features"]),
            "monitors": gains(measured, monitor_scores(self.base_measured)),
        }


def lora_norm(lora: dict[str, nn.Parameter], cfg: LoraConfig) -> float:
    """Frobenius norm of all weight updates scale B A, by |B A|^2 = <B^T B, A A^T> without forming B A."""
    scale = 1.0 if cfg.alpha is None else cfg.alpha / cfg.rank
    squared = 0.0
    for name, down in lora.items():
        if ".lora_A." in name:
            a, b = down.detach().flatten(1), lora[name.replace(".lora_A.", ".lora_B.")].detach().flatten(1)
            squared += float(((b.T @ b) * (a @ a.T)).sum())
    return scale * math.sqrt(max(0.0, squared))


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


def export(
    run: Run, cfg: Config, base: Base, prompts: Prompts, before: Tensor, after: Tensor, stopped: str | None
) -> None:
    """The LoRA, a picture of what it changed, the curves, and a card."""
    folder = run.output_dir
    save_lora(folder, base.network)
    shown = min(8, len(before))
    save_strip(folder / "before_after.png", [before[:shown], after[:shown]])
    columns = "\n".join(f"{i + 1}. {prompt} (seed {i})" for i, prompt in enumerate(prompts.prompts[:shown]))
    write_card(
        folder,
        title=f"AlignProp LoRA of {cfg.pretrained_model_name_or_path}",
        description=(
            f"Trained with {' + '.join(f'{r.weight:g} x {r.name}' for r in cfg.rewards)} by `training/alignprop.py` "
            f"(AlignProp, arXiv 2310.03739; gradient plan {cfg.plan.name}){f'; {stopped}' if stopped else ''}.\n\n"
            f"Load it with `pipe.load_lora_weights(folder)`. Above the base, below the LoRA; the columns:\n\n{columns}"
        ),
        base_model=cfg.pretrained_model_name_or_path,
        config=to_dict(cfg),
        events=read_events(folder / "events.jsonl"),
        pictures=[folder / "before_after.png"],
        tags=["lora", "alignprop"],
    )
    print(
        f"{stopped or 'finished'}\n"
        f"picture: {folder / 'before_after.png'}\n"
        f"curves:  {folder / 'curves.png'}\n"
        f"LoRA:    {folder / LORA_WEIGHTS}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    command(Config, train, argv)


if __name__ == "__main__":
    main()
