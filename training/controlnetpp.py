"""ControlNet++: train a ControlNet, then fine-tune it by the consistency of what it draws with what it was shown.

Li et al., "ControlNet++: Improving Conditional Controls with Efficient Consistency Feedback", ECCV 2024, arXiv
2404.07987. The ControlNet itself: Zhang et al. 2023, arXiv 2302.05543.

    repeat   draw images x_0 with prompts c and controls v, noise e ~ N(0, I), timesteps t ~ U{0, ..., T - 1}
             x_t = alpha_t x_0 + sigma_t e,   L_diffusion = |eps(x_t, t, c, v) - e|^2
             for the samples with t in [t_min, t_max]: x'_0 = (x_t - sigma_t eps) / alpha_t in one step, and
             L_reward = l(D(decode(x'_0)), v), with D what reads a control off an image (alignkit/conditions)
             one AdamW step on the ControlNet along the gradient of mean L_diffusion + lambda * mean L_reward

`reward_weight: 0` is ordinary ControlNet training, the paper's first stage; `reward_start` begins the second one later
in the same run, `controlnet_model_name_or_path` in a run of its own.

Where the authors' code differs from the paper or has faults, this does:
- x'_0 in closed form for epsilon, v and flow (alignkit/noise.py), never by scheduler.step, which clips it.
- Only rewarded samples are decoded and scored: the same gradient for a fifth of the cost, and a bad x'_0 of a sample
  that does not count cannot turn the loss into NaN (0 * NaN).
- L_reward is the mean over the rewarded samples of the *global* batch, not of a micro-batch, so that neither
  accumulation nor the number of processes changes what lambda means.
- Labels are numbers, resized by nearest neighbour, never colours matched after interpolation.
- Soft edges have a gradient; their HED wrapper rounds to 8 bits and has none. What has none is refused.
- Canny's ControlNet sees binary edges in training as in use; the magnitudes are the reward's target only.
- A dropped condition has no reward. The EMA comes back on resume.
- z_0 is the mode of the VAE's posterior, not a draw, so that it can be cached; images are cropped, not squashed.
- The clamp of decoded pixels to [0, 1] passes its gradient (alignkit/base.py).

For SD 1.x, SD 2.x, SDXL, SD3 and FLUX.1; what differs between them stands in alignkit/controlnet.py. In the last two,
flow models that the paper does not know, alpha_t = 1 - t/T and sigma_t = t/T, the network predicts e - x_0, timesteps
are logit-normal, and t = 200 hides less than it does in SD: `reward_min_snr` says which are rewarded there.

    accelerate launch training/controlnetpp.py --config configs/controlnetpp/emoji_segmentation.yaml
    torchrun --nproc_per_node 2 training/controlnetpp.py --config configs/controlnetpp/emoji_segmentation.yaml
    python training/controlnetpp.py --config configs/controlnetpp/emoji_depth.yaml --dry-run --random_init --shrink 4
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from alignkit.artifacts import read_events, save_strip, write_card
from alignkit.base import Base
from alignkit.conditions import Condition, ConditionConfig, build_condition, probe_condition, score
from alignkit.config import DiffusionConfig, command, free, to_dict
from alignkit.controlnet import (
    WEIGHTS,
    control_input,
    draw_controlled,
    load_controlnet,
    new_controlnet,
    predict,
    save_controlnet,
)
from alignkit.controls import Controls, Example, FolderControls, open_controls
from alignkit.data import Buckets, bucket_sizes
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
from alignkit.noise import NoiseSchedule, draw_noise
from alignkit.rewards import RewardConfig, WeightedRewards, combine
from alignkit.run import Run

VALIDATION_SEED = 1_000_000  # of the first validation example; the training's are hashes, spread over 32 bits


@dataclass
class Config(DiffusionConfig):
    controlnet_model_name_or_path: str | None = None
    """ControlNet to go on from: a diffusers folder, Hub name or .safetensors file; null makes one from the base."""
    num_layers: int | None = None
    """Blocks of SD3 or FLUX that one from the base copies; null: 12 of SD3, 4 of FLUX, as diffusers."""
    num_single_layers: int | None = None
    """The same, of FLUX's later blocks, without a text of their own; null: 10."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """What the ControlNet is shown and, with reward_weight, what its images are compared by."""
    reward_weight: float = 0.0
    """lambda; 0 is ordinary ControlNet training."""
    reward_timesteps: list[int] = field(default_factory=lambda: [0, 200])
    """First and last timestep with a reward, of the base's own schedule, both included."""
    reward_min_snr: float | None = None
    """In place of reward_timesteps: reward where the signal-to-noise ratio is at least this; 3.06 is SD's t <= 200."""
    reward_start: int = 0
    """First update with a reward; the ones before it are the paper's first stage."""
    timestep_shift: float = 1.0
    """Of a flow model: above 1, more of the noisy timesteps are drawn, as sigma becomes s sigma / (1 + (s - 1) sigma);
    SD3 was trained with 3 at 1024 pixels (Esser et al. 2024, section 5.3.2)."""
    train_guidance_scale: float = 1.0
    """What a network that reads its guidance, FLUX.1-dev, is told in training; diffusers' script says 3.5."""

    train_data_dir: str = "emoji"
    """"emoji" (scenes drawn on the fly) or a folder of images with metadata.jsonl: `alignkit data check` says how."""
    validation_data_dir: str | None = None
    """The same, for validation; null takes the first images of train_data_dir (for the emoji world, other scenes)."""
    condition_column: str | None = None
    """Key of metadata.jsonl with the controls' files; null is the condition's own, such as label or depth."""
    resolution: int | None = None
    """Side of the images in pixels; null is the base's own."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut from an image whose shorter side was resized to `resolution`."""
    bucket_batch_size: int = 0
    """Above 0, images keep their aspect up to 2 : 1: so many samples in a row, a multiple of train_batch_size, share a
    height and width of about resolution^2 pixels, and `crop` is for what is over. 0 cuts squares."""
    prompt_dropout: float = 0.0
    """Share of samples that see the empty prompt, for classifier-free guidance."""
    condition_dropout: float = 0.0
    """Share of samples that see a black control; they have no reward."""
    cache: bool = free(False)
    """Keep latents, targets and prompt embeddings of all images after their first use, each process in its own memory
    (at 512 pixels 1 MB an image for a map, 0.3 MB for labels); needs crop: center.
    A control's own latents, of SD3 and FLUX, are encoded anew."""
    gradient_checkpointing: bool = free(False)
    """Of ControlNet, frozen network and VAE decoder: less memory, each computed twice."""
    offload_text_encoders: bool = free(False)
    """Leave them in the CPU's memory, where they encode prompts, of which the last 1,000 are remembered: 9 GB less on a
    GPU for SD3 and FLUX."""

    monitors: list[RewardConfig] = field(default_factory=list)
    """Rewards of the validation images that are logged, never optimised."""
    num_validation_images: int = 16
    """Image i is of validation example i and seed i."""
    num_inference_steps: int = 20
    """Of the validation, by DDIM, or Euler for a flow model."""
    guidance_scale: float = 7.5
    """Of the validation's guidance; 1 turns it off."""
    negative_prompt: str = ""
    """Of the validation."""

    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig, metadata={"free": True})
    """When to end a run that exploits its reward: the consistency of the validation images, against the monitors."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("prompt_dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 0 and below 1, got {getattr(self, name)}")
        for name in ("num_validation_images", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("reward_weight", "reward_start", "bucket_batch_size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        span = self.reward_timesteps
        if len(span) != 2 or not 0 <= span[0] <= span[1]:
            raise ValueError(f"reward_timesteps: expected [first, last] with 0 <= first <= last, got {span}")
        acts = self.reward_weight == 0 or self.dry_run or self.reward_start < self.max_train_steps
        if not acts and self.estimate == "no":
            raise ValueError(
                f"reward_start: expected below max_train_steps ({self.max_train_steps}), or reward_weight: 0 for the "
                f"first stage alone, got {self.reward_start}"
            )
        for name in ("reward_min_snr", "timestep_shift", "train_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected above 0, got {value}")
        if self.quantization != "no" and not self.controlnet_model_name_or_path:
            raise ValueError(
                f"quantization {self.quantization}: expected controlnet_model_name_or_path, as rounded weights are no "
                "start for a ControlNet, got none"
            )
        if self.cache and (self.crop == "random" or self.train_data_dir == "emoji"):
            raise ValueError("cache: expected a folder of images and crop: center, since other images never come again")
        if self.bucket_batch_size % self.train_batch_size:
            raise ValueError(
                f"bucket_batch_size: expected a multiple of train_batch_size ({self.train_batch_size}), as the images "
                f"of a batch have one size, got {self.bucket_batch_size}"
            )
        if self.bucket_batch_size and self.train_data_dir == "emoji":
            raise ValueError("bucket_batch_size: expected 0 for the emoji world, whose scenes are squares")
        if self.validation_steps % self.logging_steps:
            raise ValueError(
                f"validation_steps: expected a multiple of logging_steps ({self.logging_steps}), as its results are "
                f"logged with the others, got {self.validation_steps}"
            )


class Draw(NamedTuple):
    """What chance decides for one sample, but for its noise."""

    timestep: Tensor
    drop_prompt: bool
    drop_condition: bool
    rewarded: bool


class Batch(NamedTuple):
    x_0: Tensor  # latents [b, C, h, w]
    targets: Tensor  # [b, H, W]
    prompts: list[str]


class Losses(NamedTuple):
    """Of the samples of a micro-batch, [b]."""

    diffusion: Tensor
    reward: Tensor  # the consistency loss; 0 where there is none
    clamped: Tensor  # share of decoded pixels outside [0, 1]; 0 where there is none


def train(cfg: Config) -> Path:
    """Runs or resumes the training. Returns its folder, a ControlNet of diffusers with a card."""
    condition = build_condition(cfg.condition.name, **cfg.condition.args)
    data = open_controls(cfg.train_data_dir, condition, cfg.condition_column, cfg.crop)
    fixed = data
    if cfg.validation_data_dir:
        fixed = open_controls(cfg.validation_data_dir, condition, cfg.condition_column)

    run = Run(cfg, "controlnetpp")
    if run.is_main and isinstance(data, FolderControls):
        print(data.summary(cfg.condition_column or condition.column), flush=True)
    base = run.load_base(offload_text_encoders=cfg.offload_text_encoders)
    check_settings(cfg, base)
    base.check_prompts([*data.prompts(), *fixed.prompts(), cfg.negative_prompt])
    size = base.image_size(cfg.resolution, cfg.resolution)
    condition.to(run.device)
    load = Loader(run, cfg, data, base, condition, size)
    if cfg.reward_weight:
        for height, width in load.sizes():
            probe_condition(condition, height, width, run.device)
    controlnet = make_controlnet(cfg, base)
    run.speed_up(controlnet)
    monitors = combine(cfg.monitors).to(run.device) if cfg.monitors else None
    rewarded_snr = snr_range(cfg, base.schedule)

    params = dict(controlnet.named_parameters())
    state, best = {"validations": [], "start": {}}, {}
    run.prepare(params, state, best)
    validation = Validation(cfg, base, controlnet, condition, monitors, fixed, size)
    if run.position == 0:
        with run.first_validation():
            images, measured = validation.measure()
            state["start"] = monitor_scores(measured)
            state["validations"].append(validation.summary(0, images, measured, state["start"]))
        run.show(0, "start", images, validation.prompts)
        run.show(0, "control", validation.controls, validation.prompts)

    encode_prompts = partial(encode_prompt, base, guidance_scale=cfg.train_guidance_scale)
    if cfg.cache:
        encode_prompts = remembering(encode_prompts, run.device)
    stopped, images = None, None
    for step in run.steps():
        weight = cfg.reward_weight if step >= cfg.reward_start or cfg.dry_run else 0.0
        everywhere = range(step * run.global_batch, (step + 1) * run.global_batch)  # also of other processes
        draws = {index: draw(cfg, run, base.schedule, rewarded_snr, step, index) for index in everywhere}
        rewarded = sum(d.rewarded for d in draws.values()) if weight else 0
        per_rewarded = run.global_batch / max(1, rewarded)  # makes the mean over all samples the mean over the rewarded
        measured = []
        for indices in run.micro_batches(step):
            batch = load(step, indices)
            chance = [draws[i] for i in indices]
            noise = [draw_noise(batch.x_0.shape[1:], run.generator(step, i), cfg.noise_offset) for i in indices]
            predict = controlled(base, controlnet, condition, batch, chance, encode_prompts)
            losses = controlnet_losses(
                predict,
                base.schedule,
                batch.x_0,
                torch.stack(noise).to(batch.x_0),
                torch.stack([d.timestep for d in chance]).to(run.device),
                torch.tensor([d.rewarded and weight > 0 for d in chance]),
                base.decode,
                lambda images, rows, targets=batch.targets: condition(images, targets[rows]),
                cfg.snr_gamma,
            )
            consistency = per_rewarded * losses.reward
            loss = losses.diffusion + weight * consistency if weight else losses.diffusion
            run.backward(loss, diffusion=losses.diffusion, reward=losses.reward)
            measured.append((loss.detach(), losses.diffusion.detach(), consistency.detach(), losses.clamped))
        grad_norm = run.update()

        loss, diffusion, consistency, clamped = (torch.cat(parts) for parts in zip(*measured, strict=True))
        scalars = {"loss": loss, "diffusion": diffusion, "grad_norm": grad_norm}
        if weight:
            none = math.nan if rewarded == 0 else 1.0
            scalars |= {"rewarded_share": rewarded / run.global_batch, "reward_loss": none * consistency}
            scalars |= {"clamped_share": none * per_rewarded * clamped}
        images = None
        if run.every(cfg.validation_steps, step) and not cfg.dry_run:
            with run.averaged():
                images, validated = validation.measure()
                state["validations"].append(validation.summary(step + 1, images, validated, state["start"]))
                keep_best(state["validations"], cfg.early_stop, params, best)
            run.show(step, "validation", images, validation.prompts)
            scalars |= validated
        run.log(step, **scalars)
        if images is not None:
            reason = reason_to_stop(state["validations"], cfg.early_stop)
            if run.gather(torch.tensor([int(reason is not None)], device=run.device)).any():
                stopped = f"stopped early after {step + 1} steps: {reason}"
                break

    with run.averaged():
        kept = restore_best(state["validations"], cfg.early_stop, params, best) if stopped else None
        if kept:
            stopped += f"; the ControlNet is that of step {kept}, the best by its validation"
        images = validation.measure()[0] if kept or images is None else images
        if run.is_main:
            export(run, cfg, controlnet, condition, validation, images, stopped)
    run.finish(stopped)
    return run.output_dir


def check_settings(cfg: Config, base: Base) -> None:
    """Raises ValueError for a setting that this base has no use of."""
    used = {"timestep_shift": base.schedule.is_flow, "train_guidance_scale": bool(base.guidance(1, 1.0))}
    for name, is_used in used.items():
        if not is_used and getattr(cfg, name) != 1:
            raise ValueError(f"{name}: {base.name} ({base.family.label}) has no use of it: leave it at 1")


def controlnet_losses(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    rewarded: Tensor,
    decode: Callable[[Tensor], Tensor],
    consistency_loss: Callable[[Tensor, Tensor], Tensor],
    snr_gamma: float | None = None,
) -> Losses:
    """ControlNet++, eq. 3 to 9, for b samples: x_0 and noise [b, C, h, w], timestep [b], rewarded [b] bool on the CPU.

    predict(x_t, timestep) is the denoiser with its control; decode(latents) -> images in [0, 1];
    consistency_loss(images, rows) compares them with the targets of these rows of the batch. Both see the rewarded
    samples alone, and are not called where there are none.
    """
    x_t = schedule.add_noise(x_0, noise, timestep)
    output = predict(x_t, timestep)
    diffusion = (output - schedule.target(x_0, noise, timestep)).square().flatten(1).mean(1)
    if snr_gamma:
        diffusion = diffusion * schedule.min_snr_weight(timestep, snr_gamma).to(diffusion)
    reward, clamped = torch.zeros_like(diffusion), torch.zeros_like(diffusion)
    rows = rewarded.nonzero().flatten().to(x_0.device)
    if len(rows):
        predicted_x_0 = schedule.predict_x_0(output[rows], x_t[rows], timestep[rows])
        images = decode(predicted_x_0)
        outside = ((images.detach() <= 0) | (images.detach() >= 1)).flatten(1).to(clamped.dtype).mean(1)
        compared = images.flatten(1).sum(1)  # what is not finite no condition takes; as a loss, it stops the run
        if compared.isfinite().all():
            compared = consistency_loss(images, rows)
        reward = reward.index_copy(0, rows, compared.to(reward.dtype))
        clamped = clamped.index_copy(0, rows, outside)
    return Losses(diffusion, reward, clamped)


def draw(
    cfg: Config, run: Run, schedule: NoiseSchedule, rewarded_snr: tuple[float, float], step: int, index: int
) -> Draw:
    """By the sample's global index alone, so that every process knows how many of the global batch are rewarded."""
    generator = run.generator(step, index, "draw")
    timestep = draw_timestep(schedule, generator, cfg.timestep_shift)
    drop_prompt = bool(torch.rand((), generator=generator) < cfg.prompt_dropout)
    drop_condition = bool(torch.rand((), generator=generator) < cfg.condition_dropout)
    low, high = rewarded_snr
    in_range = low <= float(schedule.snr(timestep)) <= high
    return Draw(timestep, drop_prompt, drop_condition, in_range and not drop_condition)


def draw_timestep(schedule: NoiseSchedule, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Uniform; for a flow model logit-normal and then shifted, as SD3 (Esser et al. 2024, sections 3.1 and 5.3.2)."""
    if schedule.is_flow:
        sigma = torch.randn((), generator=generator).sigmoid()
        return schedule.num_train_timesteps * (shift * sigma / (1 + (shift - 1) * sigma))
    return torch.randint(schedule.num_train_timesteps, (), generator=generator)


def snr_range(cfg: Config, schedule: NoiseSchedule) -> tuple[float, float]:
    """Lowest and highest signal-to-noise ratio at which a sample is rewarded."""
    if cfg.reward_min_snr is not None:
        if not schedule.is_flow and not float(schedule.snr(0)) >= cfg.reward_min_snr:
            raise ValueError(
                f"reward_min_snr: expected at most {float(schedule.snr(0)):.3g}, the ratio at this base's first "
                f"timestep, got {cfg.reward_min_snr:g}"
            )
        return cfg.reward_min_snr, math.inf
    first, last = cfg.reward_timesteps
    if last >= schedule.num_train_timesteps:
        raise ValueError(f"reward_timesteps: expected at most {schedule.num_train_timesteps - 1}, got {last}")
    return float(schedule.snr(last)), float(schedule.snr(first))


def encode_prompt(
    base: Base, prompts: list[str], size: tuple[int, int], guidance_scale: float = 1.0
) -> dict[str, Tensor]:
    """What the networks are told of B prompts; of dropped ones, "", what guidance makes of an empty negative prompt."""
    return base.condition(prompts, *size, negative=True) | base.guidance(len(prompts), guidance_scale)


EncodePrompts = Callable[[list[str], tuple[int, int]], dict[str, Tensor]]


def remembering(encode_prompts: EncodePrompts, device: torch.device) -> EncodePrompts:
    """The function, which encodes each prompt once, for each size (of which SDXL is told)."""
    known: dict[tuple[str, tuple[int, int]], dict[str, Tensor]] = {}

    def encode(prompts: list[str], size: tuple[int, int]) -> dict[str, Tensor]:
        for prompt in prompts:
            if (prompt, size) not in known:
                known[prompt, size] = {name: t.cpu() for name, t in encode_prompts([prompt], size).items()}
        rows = [known[prompt, size] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}

    return encode


def controlled(
    base: Base,
    controlnet: nn.Module,
    condition: Condition,
    batch: Batch,
    chance: Sequence[Draw],
    encode_prompts: EncodePrompts,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser of a batch, with its prompts and controls, where they were not dropped."""
    prompts = ["" if d.drop_prompt else prompt for prompt, d in zip(batch.prompts, chance, strict=True)]
    told = encode_prompts(prompts, tuple(batch.targets.shape[-2:]))
    kept = torch.tensor([not d.drop_condition for d in chance], device=batch.targets.device)
    control = condition.control(batch.targets).float() * kept[:, None, None, None]
    shown = control_input(base, controlnet, control)
    return lambda x_t, timestep: predict(base, controlnet, x_t, timestep, shown, told)


class Loader:
    """Micro-batches by global sample index: an image comes once an epoch, in a seeded order, or as `Buckets` says."""

    def __init__(self, run: Run, cfg: Config, data: Controls, base: Base, condition: Condition, size: tuple[int, int]):
        self.run, self.data, self.base, self.condition, self.size = run, data, base, condition, size
        self.buckets = None
        if cfg.bucket_batch_size:
            self.buckets = Buckets(data.shapes(), bucket_sizes(size, base.size_multiple), cfg.bucket_batch_size)
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}  # by row: latents and compact targets, on the CPU
        self.cache = cfg.cache
        self.pool = ThreadPoolExecutor()  # decoding images is most of it, and leaves Python's lock
        self.ahead: tuple[tuple | None, list[Future]] = None, []  # (step, indices), and their examples on the way

    def row(self, index: int) -> int:
        if self.buckets:
            return self.buckets.row(index, self.run.permutation)
        return index if self.data.size is None else self.run.shuffled(self.data.size, index, "rows")

    def sizes(self) -> list[tuple[int, int]]:
        """All (height, width) that the micro-batches have."""
        if self.buckets is None:
            return [self.size]
        return sorted({self.buckets.size(row) for row in range(self.data.size)})

    def __call__(self, step: int, indices: Sequence[int]) -> Batch:
        if not self.cache:
            key, reading = self.ahead
            reading = reading if key == (step, indices) else self.read(step, indices)
            following = self.run.following(step, indices)
            self.ahead = following, self.read(*following) if following else []
            examples = [one.result() for one in reading]
            return Batch(*self.encode(examples), [example.prompt for example in examples])
        rows, generators = self.drawn(step, indices)
        new = [row for row in dict.fromkeys(rows) if row not in self.cached]
        for row, example in zip(new, self.pool.map(self.example, new, (torch.Generator() for _ in new)), strict=True):
            # alone: in which company a row first comes depends on when the run resumed
            x_0, targets = self.encode([example])
            self.cached[row] = (x_0[0].cpu(), compact(targets[0].cpu()))
        cached = [self.cached[row] for row in rows]
        x_0, targets = (torch.stack(parts).to(self.run.device) for parts in zip(*cached, strict=True))
        targets = targets if targets.is_floating_point() else targets.long()
        return Batch(x_0, targets, [self.data.prompt(row, g) for row, g in zip(rows, generators, strict=True)])

    def drawn(self, step: int, indices: Sequence[int]) -> tuple[list[int], list[torch.Generator]]:
        return [self.row(i) for i in indices], [self.run.generator(step, i, "data") for i in indices]

    def read(self, step: int, indices: Sequence[int]) -> list[Future]:
        """Begins to read them, while the networks are at work on others."""
        return [self.pool.submit(self.example, *one) for one in zip(*self.drawn(step, indices), strict=True)]

    def example(self, row: int, generator: torch.Generator) -> Example:
        return self.data.example(row, self.buckets.size(row) if self.buckets else self.size, generator)

    def encode(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Latents [b, C, h, w] and targets [b, H, W]."""
        return encode(self.base, self.condition, examples)


def compact(targets: Tensor) -> Tensor:
    """Class numbers in an eighth of their 64 bits where that holds them; other maps as they are."""
    return targets if targets.is_floating_point() or targets.max() > 255 else targets.byte()


@torch.no_grad()
def encode(base: Base, condition: Condition, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Latents [b, C, h, w], and targets [b, H, W], extracted where an example has none."""
    images = torch.stack([example.image for example in examples]).to(base.device)
    targets = [example.target for example in examples]
    if any(target is None for target in targets):
        extracted = condition.extract(images)
        targets = [extracted[i] if target is None else target for i, target in enumerate(targets)]
    return base.encode(images).float(), torch.stack([target.to(images.device) for target in targets])


def make_controlnet(cfg: Config, base: Base) -> nn.Module:
    """From the config's ControlNet or, with random_init or without one, from the base."""
    path = None if cfg.random_init else cfg.controlnet_model_name_or_path
    if path is None:
        depths = cfg.num_layers, cfg.num_single_layers
        controlnet = new_controlnet(base.network, base.vae_scale_factor, cfg.seed, *depths)
    else:
        controlnet = load_controlnet(path, base.network, base.vae_scale_factor)
    if cfg.gradient_checkpointing:
        for module in (controlnet, base.network, base.vae):
            module.enable_gradient_checkpointing()
    return controlnet.requires_grad_(True).eval()  # eval: a ControlNet has no dropout to train with


class Validation:
    """Fixed examples and seeds: what is drawn of their prompts and controls, and how it is judged."""

    def __init__(
        self,
        cfg: Config,
        base: Base,
        controlnet: nn.Module,
        condition: Condition,
        monitors: WeightedRewards | None,
        data: Controls,
        size: tuple[int, int],
    ):
        self.cfg, self.base, self.controlnet, self.condition, self.monitors = cfg, base, controlnet, condition, monitors
        rows = [i if data.size is None else i % data.size for i in range(cfg.num_validation_images)]
        seeds = [torch.Generator().manual_seed(VALIDATION_SEED + i) for i in range(len(rows))]
        examples = [data.example(row, size, seed) for row, seed in zip(rows, seeds, strict=True)]
        self.prompts = [example.prompt for example in examples]
        size = cfg.train_batch_size  # as many at once as training has room for
        encoded = [encode(base, condition, examples[i : i + size]) for i in range(0, len(examples), size)]
        self.x_0, self.targets = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        self.controls = condition.control(self.targets).float()

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Images, and what to log of them: the condition's metrics, the monitors, L_diffusion at fixed noise."""
        cfg = self.cfg
        images = draw_controlled(
            self.base,
            self.controlnet,
            self.controls,
            self.prompts,
            range(len(self.prompts)),
            num_inference_steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            negative_prompt=cfg.negative_prompt,
            batch_size=cfg.train_batch_size,
        )
        figures = score(self.condition, images, self.targets, cfg.train_batch_size)
        scalars = {f"validation/{name}": value for name, value in figures.items()}
        losses, consistency, scores = [], [], []
        for rows in torch.arange(len(images)).split(cfg.train_batch_size):
            losses.append(self.diffusion(rows))
            consistency.append(self.condition(images[rows], self.targets[rows]))
            if self.monitors:
                scores.append(self.monitors(images[rows], [self.prompts[i] for i in rows]).values)
        scalars["validation/diffusion"], scalars["validation/reward_loss"] = torch.cat(losses), torch.cat(consistency)
        for name in scores[0] if scores else ():
            scalars[f"monitor/{name}"] = torch.cat([part[name] for part in scores])
        return images, scalars

    def summary(
        self, step: int, images: Tensor, measured: dict[str, Tensor | float], start: dict[str, list[float]]
    ) -> dict[str, Any]:
        """As alignkit/early_stop.py has it."""
        return {
            "step": step,
            "reward": -float(measured["validation/reward_loss"].mean()),
            "diversity": diversity(coarse_features(images)),
            "monitors": gains(measured, start),
        }

    def diffusion(self, rows: Tensor) -> Tensor:
        """L_diffusion [b] at evenly spaced timesteps and fixed noise: the training's own is drowned in theirs."""
        schedule, x_0 = self.base.schedule, self.x_0[rows]
        timestep = ((rows + 0.5) / len(self.x_0) * schedule.num_train_timesteps).long().to(x_0.device)
        noise = torch.stack([torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(int(i))) for i in rows])
        noise = noise.to(x_0)
        prompts, size = [self.prompts[i] for i in rows], tuple(self.controls.shape[-2:])
        told = encode_prompt(self.base, prompts, size, self.cfg.train_guidance_scale)
        shown = control_input(self.base, self.controlnet, self.controls[rows])
        x_t = schedule.add_noise(x_0, noise, timestep)
        output = predict(self.base, self.controlnet, x_t, timestep, shown, told)
        return (output - schedule.target(x_0, noise, timestep)).square().flatten(1).mean(1)


def export(
    run: Run,
    cfg: Config,
    controlnet: nn.Module,
    condition: Condition,
    validation: Validation,
    images: Tensor,
    stopped: str | None,
) -> None:
    """The ControlNet, a strip of what it draws, the curves, and a card."""
    folder = run.output_dir
    save_controlnet(folder, controlnet)
    condition.save(folder)
    shown = slice(0, 8)
    control = validation.controls[shown]
    extracted = condition.control(condition.extract(images[shown])).float()
    save_strip(folder / "strip.png", [control, images[shown], extracted, (extracted - control).abs()])
    columns = "\n".join(f"{i + 1}. {prompt} (seed {i})" for i, prompt in enumerate(validation.prompts[shown]))
    pipeline = validation.base.family.pipeline.__name__.replace("Pipeline", "ControlNetPipeline")
    reward = f"consistency reward of weight {cfg.reward_weight:g}" if cfg.reward_weight else "no reward"
    reward += f", from update {cfg.reward_start} on" if cfg.reward_weight and cfg.reward_start else ""
    write_card(
        folder,
        title=f"ControlNet of {cfg.pretrained_model_name_or_path}: {cfg.condition.name}",
        description=(
            f"Trained with {reward} by `training/controlnetpp.py` (ControlNet++, arXiv 2404.07987)"
            f"{f'; {stopped}' if stopped else ''}.\n\n"
            f"Load it with `{type(controlnet).__name__}.from_pretrained(folder)` into a `{pipeline}`. From top to "
            "bottom: the control, the image, the control extracted from it by the training's own judge, the "
            f"difference of the two. The columns:\n\n{columns}"
        ),
        base_model=cfg.pretrained_model_name_or_path,
        config=to_dict(cfg),
        events=read_events(folder / "events.jsonl"),
        pictures=[folder / "strip.png"],
        tags=["controlnet", "controlnetpp"],
    )
    print(
        f"{stopped or 'finished'}\npicture:    {folder / 'strip.png'}\n"
        f"curves:     {folder / 'curves.png'}\nControlNet: {folder / WEIGHTS}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    command(Config, train, argv)


if __name__ == "__main__":
    main()
