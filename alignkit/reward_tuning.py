"""What trainers share that tune a LoRA by a reward, however they follow it: config, judges, validation, early stop.

The first half is the config that such a trainer's own inherits from; then what scores images, then what draws the fixed
validation images again and again, ends the run that exploits its reward, and writes the folder.
"""

import inspect
import math
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from alignkit.artifacts import LORA_WEIGHTS, read_events, save_lora, save_strip, write_card
from alignkit.base import Base, add_lora
from alignkit.config import LoraConfig, RunConfig, free, to_dict
from alignkit.data import Prompts, read_prompts
from alignkit.early_stop import (
    EarlyStopConfig,
    best_of,
    coarse_features,
    diversity,
    gains,
    keep_best,
    monitor_scores,
    reason_to_stop,
    restore_best,
)
from alignkit.emoji import role
from alignkit.named import refuse_judges
from alignkit.rewards import Combined, RewardConfig, WeightedRewards, combine
from alignkit.rewards.clip import Encoder
from alignkit.run import Run
from alignkit.sampling import sample


@dataclass
class RewardTuningConfig(RunConfig):
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter that is trained."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """What is optimised: a weighted sum."""
    monitors: list[RewardConfig] = field(default_factory=list)
    """Logged beside it, never optimised; weight and loss have no effect. The first with a CLIP measures diversity."""
    gradient_checkpointing: bool = free(False)
    """Also compute each block of the network twice, for less memory within a denoising step."""
    offload_text_encoders: bool = free(False)
    """Leave them in the CPU's memory, where they encode prompts, of which the last 1,000 are remembered: 9 GB less on a
    GPU for SD3 and FLUX."""
    prompt_file: str = ""
    """Prompts to train on: .txt, one a line, or .jsonl with `prompt` and columns for the rewards."""
    negative_prompt: str = ""
    """For classifier-free guidance."""
    num_images_per_prompt: int = 1
    """Samples that share a prompt each time it comes."""
    num_inference_steps: int = 50
    """N, the denoising steps."""
    guidance_scale: float = 7.5
    """Of classifier-free guidance; 1 turns it off."""
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
        if not self.rewards:
            raise ValueError("rewards: expected at least one reward, got none")
        for reward in self.rewards:
            refuse_judges(reward.name, reward.args, "monitor")
        if not self.prompt_file:
            raise ValueError("prompt_file: expected a .txt or .jsonl file, got none")
        if self.validation_steps % self.logging_steps:
            raise ValueError(
                f"validation_steps: expected a multiple of logging_steps ({self.logging_steps}), as its results are "
                f"logged with the others, got {self.validation_steps}"
            )


# What is trained, and on what


def read_training_prompts(cfg: RewardTuningConfig) -> tuple[Prompts, Prompts]:
    """The prompts to train on and those of the validation images, one an image. Raises as `read_prompts`."""
    prompts = read_prompts(cfg.prompt_file)
    fixed = read_prompts(cfg.validation_prompt_file) if cfg.validation_prompt_file else prompts
    return prompts, fixed.rows([i % len(fixed) for i in range(cfg.num_validation_images)])


def load_tuned(run: Run, cfg: RewardTuningConfig, *files: Prompts) -> tuple[Base, dict[str, nn.Parameter], "Judges"]:
    """The base with a LoRA, the LoRA's parameters, and the judges.

    Raises ValueError for a prompt that the base cuts, or whose columns a reward or monitor could not take.
    """
    base = run.load_base(offload_text_encoders=cfg.offload_text_encoders)
    base.check_prompts([prompt for prompts in files for prompt in prompts.prompts] + [cfg.negative_prompt])
    if cfg.gradient_checkpointing:
        base.network.enable_gradient_checkpointing()
    c = cfg.lora
    lora = add_lora(base.network, c.rank, c.lora_alpha, c.target_modules, c.dropout, cfg.seed)
    judges = Judges(combine(cfg.rewards), combine(cfg.monitors) if cfg.monitors else None)
    for scores in filter(None, (judges.rewards, judges.monitors)):
        if cfg.pretrained_model_name_or_path != "emoji" and run.is_main:
            warn_of_emoji_judges(scores)
        for prompts in files:
            scores.check(prompts.prompts, **prompts.columns)
    return base, lora, judges.to(run.device)


def warn_of_emoji_judges(scores: WeightedRewards) -> None:
    """Rewards without `args` are judges of 64-pixel emoji scenes, which a base of photographs satisfies by noise."""
    for config, reward in zip(scores.configs, scores.rewards, strict=True):
        defaults = {name: one.default for name, one in inspect.signature(type(reward)).parameters.items()}
        for name, value in (defaults | config.args).items():
            if isinstance(value, str) and role(value):
                warnings.warn(
                    f"{config.name} scores by {value}, a judge of the emoji world's scenes: for another base, name one "
                    f"of its kind of images in args ({name}: ...).",
                    stacklevel=3,
                )


# Scores


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


def lora_norm(lora: dict[str, nn.Parameter], cfg: LoraConfig) -> float:
    """Frobenius norm of all weight updates scale B A, by |B A|^2 = <B^T B, A A^T> without forming B A."""
    squared = 0.0
    for name, down in lora.items():
        if ".lora_A." in name:
            a, b = down.detach().flatten(1), lora[name.replace(".lora_A.", ".lora_B.")].detach().flatten(1)
            squared += float(((b.T @ b) * (a @ a.T)).sum())
    return cfg.lora_alpha / cfg.rank * math.sqrt(max(0.0, squared))


# Validation


class Validation:
    """Fixed prompts and seeds: what the base draws of them, what the LoRA makes of that, and when that ends the run.

    Make it after `run.prepare`. `history`, a list in the run's extra state, is what the early stop looks back on, and
    `tensors`, the run's extra tensors, hold the LoRA of the best validation.
    """

    def __init__(
        self,
        run: Run,
        cfg: RewardTuningConfig,
        base: Base,
        lora: dict[str, nn.Parameter],
        judges: Judges,
        prompts: Prompts,
        history: list[dict[str, Any]],
        tensors: MutableMapping[str, Tensor],
    ):
        self.run, self.cfg, self.base, self.lora, self.judges, self.prompts = run, cfg, base, lora, judges, prompts
        self.history, self.tensors, self.images, self.kept = history, tensors, None, None
        with run.first_validation():
            base.network.disable_adapters()
            self.base_images = self.draw()
            base.network.enable_adapters()
            self.base_measured = judges.measure(self.base_images, prompts)
        self.start = self.summary(self.base_measured)
        if run.position == 0:
            run.show(0, "base", self.base_images, prompts.prompts)

    @torch.no_grad()
    def draw(self) -> Tensor:
        """[N, 3, H, W]: the pixels that the stock pipeline draws for the same prompts and generators."""
        self.base.network.eval()
        cfg, images = self.cfg, []
        size = (cfg.resolution, cfg.resolution)
        for first in range(0, len(self.prompts), cfg.train_batch_size):
            prompts = self.prompts.prompts[first : first + cfg.train_batch_size]
            generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
            x_T = randn_tensor((len(prompts), *self.base.latent_shape(*size)), generators, self.base.device)
            denoiser = self.base.denoiser(prompts, cfg.negative_prompt, cfg.guidance_scale, *size)
            timesteps = self.base.timesteps(cfg.num_inference_steps, *size)
            images.append(self.base.decode(sample(denoiser, x_T, self.base.schedule, timesteps, None)))
        self.run.require_finite(images := torch.cat(images), "the validation's images")
        return images

    def measure(self, step: int) -> dict[str, Tensor | float]:
        """What to log of the images at the end of a step; nothing where no validation is due."""
        self.images = None
        if not self.run.every(self.cfg.validation_steps, step) or self.cfg.dry_run:
            return {}
        with self.run.averaged():
            self.images, norm = self.draw(), lora_norm(self.lora, self.cfg.lora)
            measured = self.judges.measure(self.images, self.prompts)
            self.history.append(self.summary(measured) | {"step": step + 1})
            keep_best([self.start, *self.history], self.cfg.early_stop, self.lora, self.tensors)
        self.run.show(step, "validation", self.images, self.prompts.prompts)
        del measured["features"]
        return {f"validation/{name}": value for name, value in measured.items()} | {
            "validation/diversity": self.history[-1]["diversity"],
            "drift/images": (self.images - self.base_images).square().mean((1, 2, 3)).sqrt(),
            "drift/lora_norm": norm,
        }

    def reason_to_stop(self, step: int) -> str | None:
        """In words, after a `measure` that was due; if one process has a reason, by a rounding error, all have."""
        if self.images is None:
            return None
        history = [self.start, *self.history]
        reason = reason_to_stop(history, self.cfg.early_stop)
        if not self.run.gather(torch.tensor([int(reason is not None)], device=self.run.device)).any():
            return None
        self.kept = best_of(history, self.cfg.early_stop)
        kept = f"; the LoRA is that of step {self.kept['step']}, the best by its validation" if self.kept else ""
        return f"stopped early after {step + 1} steps: {reason or 'as another process did'}{kept}"

    def summary(self, measured: dict[str, Tensor]) -> dict[str, Any]:
        """As alignkit/early_stop.py has it, from the base on."""
        return {
            "reward": -float(measured["loss"].mean()),
            "diversity": diversity(measured["features"]),
            "monitors": gains(measured, monitor_scores(self.base_measured)),
        }


# What it leaves behind


def export(run: Run, validation: Validation, method: str, tag: str, source: str, stopped: str | None) -> None:
    """The LoRA, a picture of what it changed, the curves, and a card: on every process, at the end of a run.

    `method` is its name in words, `source` the script and what it follows.
    """
    cfg, base, folder, prompts = validation.cfg, validation.base, run.output_dir, validation.prompts.prompts
    with run.averaged():
        if validation.kept:
            history = [validation.start, *validation.history]
            restore_best(history, cfg.early_stop, validation.lora, validation.tensors)
        if validation.kept or validation.images is None:
            validation.images = validation.draw()
        if not run.is_main:
            return
        save_lora(folder, base.network)
    shown = min(8, len(prompts))
    save_strip(folder / "before_after.png", [validation.base_images[:shown], validation.images[:shown]])
    columns = "\n".join(f"{i + 1}. {prompt} (seed {i})" for i, prompt in enumerate(prompts[:shown]))
    write_card(
        folder,
        title=f"{method} LoRA of {cfg.pretrained_model_name_or_path}",
        description=(
            f"Trained with {' + '.join(f'{r.weight:g} x {r.name}' for r in cfg.rewards)} by {source}"
            f"{f'; {stopped}' if stopped else ''}.\n\n"
            f"Load it with `pipe.load_lora_weights(folder)`. Above the base, below the LoRA; the columns:\n\n{columns}"
        ),
        base_model=cfg.pretrained_model_name_or_path,
        config=to_dict(cfg),
        events=read_events(folder / "events.jsonl"),
        pictures=[folder / "before_after.png"],
        tags=["lora", tag],
    )
    print(
        f"{stopped or 'finished'}\n"
        f"picture: {folder / 'before_after.png'}\n"
        f"curves:  {folder / 'curves.png'}\n"
        f"LoRA:    {folder / LORA_WEIGHTS}",
        flush=True,
    )
