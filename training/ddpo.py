"""DDPO: fine-tune a LoRA by policy gradient, with each denoising step as an action; the comparator of AlignProp.

Black, Janner, Du, Kostrikov & Levine, "Training Diffusion Models with Reinforcement Learning", 2023, arXiv 2305.13301;
this is their DDPO_IS.

    repeat   draw prompts c and noise x_T ~ N(0, I); x_0 by DDIM with eta 1, and log p of each step
             A = (r(decode(x_0), c) - mean) / standard deviation of the prompt's latest rewards
             for each share of these samples, one AdamW step on the LoRA along the gradient of the mean over samples and
             timesteps of max(-A rho, -A clip(rho, 1 - e, 1 + e)), rho = p(x_{t-1} | x_t, c) / p_old(x_{t-1} | x_t, c)

The reward needs no gradient. `rewards` are those of training/alignprop.py, so r is minus its loss, weights and shapes
included: both optimise the same number.

As in the authors' code rather than in the paper:
- log p is the mean over a latent's numbers, not the sum that a density has. `clip_range` is a number of that scale.
- Advantages are clipped to `adv_clip_max`; the guided output is what acts, in sampling and in training.
- A prompt with fewer than `per_prompt_min_count` rewards so far takes mean and deviation of the whole round.
Where the authors' code does otherwise:
- Timesteps of a sample are not shuffled: the gradient is summed over all of them before a step, in any order.
- Images of a prompt are spread over the shares of a round (`num_images_per_prompt`), so that rounds know its baseline.
- The last step draws no noise and is no action. What it adds cannot be seen, but the smaller the noise, the larger the
  gradient of its log-probability: with few steps and "trailing" spacing it drowned that of all others.

    accelerate launch training/ddpo.py --config configs/ddpo/emoji.yaml
    torchrun --nproc_per_node 2 training/ddpo.py --config configs/ddpo/emoji.yaml
    python training/ddpo.py --config configs/ddpo/emoji.yaml --dry-run --random_init --shrink 4
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from alignkit.base import Base
from alignkit.config import command
from alignkit.data import Prompts
from alignkit.early_stop import diversity
from alignkit.reward_tuning import Judges, RewardTuningConfig, Validation, export, load_tuned, read_training_prompts
from alignkit.run import Run
from alignkit.sampling import Denoiser


@dataclass
class Config(RewardTuningConfig):
    eta: float = 1.0
    """DDIM's noise in training, above 0: 1 is DDPM's. Validation uses 0."""
    updates_per_round: int = 4
    """Shares of a round, an update each; a round draws this many global batches."""
    num_inner_epochs: int = 1
    """How often a round's samples are trained on."""
    clip_range: float = 1e-4
    """e: a sample whose probability has changed by this ratio, in its favour, has no gradient."""
    adv_clip_max: float = 5.0
    """Largest advantage, in standard deviations."""
    per_prompt_buffer_size: int = 16
    """Latest rewards of a prompt that give its mean and standard deviation."""
    per_prompt_min_count: int = 16
    """With fewer of them, those of the whole round do."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta: expected above 0, to 1, got {self.eta}: without noise, steps have no probability")
        if self.num_inference_steps < 2:
            raise ValueError(f"num_inference_steps: expected at least 2, got {self.num_inference_steps}")
        for name in ("updates_per_round", "num_inner_epochs", "per_prompt_buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("clip_range", "adv_clip_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected above 0, got {getattr(self, name)}")
        if not 2 <= self.per_prompt_min_count <= self.per_prompt_buffer_size:
            raise ValueError(
                f"per_prompt_min_count: expected 2 to per_prompt_buffer_size ({self.per_prompt_buffer_size}), got "
                f"{self.per_prompt_min_count}"
            )
        if self.lora.dropout:
            raise ValueError(f"lora.dropout: expected 0, got {self.lora.dropout}: it would change the probabilities")


class Rollout(NamedTuple):
    """b samples as the round's policy drew them."""

    batch: Prompts
    latents: Tensor  # [N, b, C, h, w], x_T first, x_0 left out
    log_probs: Tensor  # [N - 1, b], means over a latent's numbers
    measured: dict[str, Tensor]  # of Judges


class Round(NamedTuple):
    rollouts: dict[int, Rollout]  # of this process, by the first sample of the micro-batch
    advantages: dict[int, float]  # of all samples of all processes
    rewards: dict[str, list[float]]  # the latest of each prompt, this round's included


def train(cfg: Config) -> Path:
    """Runs or resumes the training. Returns its folder, with the LoRA and its card."""
    prompts, fixed = read_training_prompts(cfg)
    run = Run(cfg, "ddpo")
    check_round(cfg, run)
    base, lora, judges = load_tuned(run, cfg, prompts, fixed)

    # A round's samples are too large to save, so what drew them is: a resumed run draws them again.
    state: dict[str, Any] = {"validations": [], "rewards": {}}
    tensors: dict[str, Tensor] = {}
    run.prepare(lora, state, tensors)
    validation = Validation(run, cfg, base, lora, judges, fixed, state["validations"], tensors)
    if cfg.dry_run:
        cfg = replace(cfg, updates_per_round=1, num_inner_epochs=1)  # so that a measured step has its share of all

    length = cfg.updates_per_round * cfg.num_inner_epochs
    drawn, stopped = None, None
    for step in run.steps():
        number, update = divmod(step, length)
        if update == 0:
            tensors |= {f"old/{name}": parameter.detach().cpu().clone() for name, parameter in lora.items()}
        if update == 0 or drawn is None:
            with run.holding({name: tensors[f"old/{name}"] for name in lora}):
                drawn = draw_round(run, cfg, base, judges, prompts, number, state["rewards"])

        share = number * cfg.updates_per_round + update % cfg.updates_per_round
        parts, measured = [], []
        for indices in run.micro_batches(share):
            rollout = drawn.rollouts[indices[0]]
            advantages = torch.tensor([drawn.advantages[i] for i in indices], device=run.device)
            parts.append(policy_update(run, cfg, base, rollout, advantages))
            measured.append(rollout.measured)
        grad_norm = run.update()
        if update == length - 1:
            state["rewards"] = drawn.rewards

        scalars = {name: torch.cat([part[name] for part in measured]) for name in measured[0]}
        scalars["diversity"] = diversity(run.gather(scalars.pop("features")))
        scalars |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        scalars |= {"grad_norm": grad_norm, "images_scored": (number + 1) * cfg.updates_per_round * run.global_batch}
        run.log(step, **scalars, **validation.measure(step))
        stopped = validation.reason_to_stop(step)
        if stopped:
            break

    export(run, validation, "DDPO", "ddpo", "`training/ddpo.py` (DDPO_IS, arXiv 2305.13301)", stopped)
    run.finish(stopped)
    return run.output_dir


def check_round(cfg: Config, run: Run) -> None:
    size = cfg.updates_per_round * run.global_batch
    if size % cfg.num_images_per_prompt:
        raise ValueError(
            f"num_images_per_prompt: expected a divisor of the round's {size} samples (updates_per_round x global "
            f"batch), got {cfg.num_images_per_prompt}"
        )


def draw_round(
    run: Run, cfg: Config, base: Base, judges: Judges, prompts: Prompts, number: int, rewards: dict[str, list[float]]
) -> Round:
    """Samples and scores of the round by the policy that the network holds, and the advantages of all processes.

    Raises:
        FloatingPointError: a reward is not finite; it names the samples.
    """
    base.network.eval()
    rollouts, indices, scored = {}, [], []
    for share in range(cfg.updates_per_round):
        for micro_batch in run.micro_batches(number * cfg.updates_per_round + share):
            batch = prompts.rows([prompt_of(run, cfg, len(prompts), i) for i in micro_batch])
            generators = [run.generator(0, i, "rollout") for i in micro_batch]
            rollout = draw_rollout(cfg, base, judges, batch, generators)
            rollouts[micro_batch[0]] = rollout
            indices += micro_batch
            scored.append(-rollout.measured["loss"].float())
    samples = run.gather(torch.tensor(indices)).tolist()
    values = dict(zip(samples, run.gather(torch.cat(scored)).tolist(), strict=True))
    samples.sort()
    bad = [i for i in samples if not torch.tensor(values[i]).isfinite()]
    if bad:
        raise FloatingPointError(f"the rewards of the samples {bad} of round {number} are not finite")
    asked = [prompts.prompts[prompt_of(run, cfg, len(prompts), i)] for i in samples]
    advantages, rewards = normalise(asked, [values[i] for i in samples], rewards, cfg)
    return Round(rollouts, dict(zip(samples, advantages, strict=True)), rewards)


def prompt_of(run: Run, cfg: Config, num_prompts: int, index: int) -> int:
    """Of a sample, by its global index: its prompt's images are as far apart as the round has room."""
    size = cfg.updates_per_round * run.global_batch
    per_round = max(1, size // cfg.num_images_per_prompt)
    number, position = divmod(index, size)
    return run.shuffled(num_prompts, number * per_round + position % per_round, "prompts")


@torch.no_grad()
def draw_rollout(cfg: Config, base: Base, judges: Judges, batch: Prompts, generators: list[torch.Generator]) -> Rollout:
    size = (cfg.resolution, cfg.resolution)
    shape = (len(batch), *base.latent_shape(*size))
    denoiser, actions, last = policy(cfg, base, batch.prompts)
    x_t = randn_tensor(shape, generators, base.device)
    latents, log_probs = [x_t], []
    for step in actions:
        output, noise = denoiser(x_t, step[0]), randn_tensor(shape, generators, base.device)
        x_prev = base.schedule.ddim_step(x_t, output, *step, cfg.eta, noise)
        log_probs.append(mean_log_prob(cfg, base, x_prev, x_t, output, step))
        latents.append(x_prev)
        x_t = x_prev
    x_t = base.schedule.ddim_step(x_t, denoiser(x_t, last), last, None)
    images = base.decode(x_t)
    # No reward takes what is not finite; as a loss, it ends the run with the samples' numbers.
    measured = judges.measure(images, batch) if images.isfinite().all() else {"loss": images.flatten(1).sum(1)}
    return Rollout(batch, torch.stack(latents), torch.stack(log_probs), measured)


def policy(cfg: Config, base: Base, prompts: list[str]) -> tuple[Denoiser, list[tuple[Tensor, Tensor]], Tensor]:
    """The guided network for B prompts, the chain's actions (timestep, prev_timestep), and its last timestep."""
    size = (cfg.resolution, cfg.resolution)
    timesteps = base.timesteps(cfg.num_inference_steps, *size)
    denoiser = base.denoiser(prompts, cfg.negative_prompt, cfg.guidance_scale, *size)
    return denoiser, [*zip(timesteps, timesteps[1:], strict=False)], timesteps[-1]


def mean_log_prob(
    cfg: Config, base: Base, x_prev: Tensor, x_t: Tensor, output: Tensor, step: tuple[Tensor, Tensor]
) -> Tensor:
    """log p(x_prev | x_t) over the number of a latent's numbers, [b]."""
    return base.schedule.ddim_log_prob(x_prev, x_t, output, *step, cfg.eta) / x_t[0].numel()


def policy_update(run: Run, cfg: Config, base: Base, rollout: Rollout, advantages: Tensor) -> dict[str, Tensor]:
    """Adds the gradient of b samples, one timestep after the other; what to log of them, [b] each."""
    denoiser, actions, _ = policy(cfg, base, rollout.batch.prompts)
    logged: dict[str, list[Tensor]] = {"policy_loss": [], "clip_fraction": [], "approx_kl": []}
    for i, step in enumerate(actions):
        x_t, x_prev = rollout.latents[i], rollout.latents[i + 1]
        log_prob = mean_log_prob(cfg, base, x_prev, x_t, denoiser(x_t, step[0]), step)
        ratio = (log_prob - rollout.log_probs[i]).exp()
        loss = clipped_loss(ratio, advantages, cfg.clip_range)
        run.backward(loss / len(actions), ratio=ratio, advantage=advantages)
        logged["policy_loss"].append(loss.detach())
        logged["clip_fraction"].append(((ratio - 1).abs() > cfg.clip_range).float())
        logged["approx_kl"].append(0.5 * (log_prob.detach() - rollout.log_probs[i]).square())
    return {name: torch.stack(values).mean(0) for name, values in logged.items()}


def clipped_loss(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - e, 1 + e)), [b]. Schulman et al. 2017, eq. 7, arXiv 1707.06347."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def normalise(
    prompts: list[str], rewards: list[float], latest: dict[str, list[float]], cfg: Config
) -> tuple[list[float], dict[str, list[float]]]:
    """Advantages of a round's samples, and the latest rewards of each prompt with theirs. DDPO, section 5.2 and D.

    A prompt's mean and standard deviation are over its `latest` rewards and these, up to per_prompt_buffer_size of
    them; over the round while there are fewer than per_prompt_min_count.
    """
    latest = {prompt: list(values) for prompt, values in latest.items()}
    for prompt, reward in zip(prompts, rewards, strict=True):
        latest[prompt] = [*latest.get(prompt, []), reward][-cfg.per_prompt_buffer_size :]
    advantages = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        enough = len(latest[prompt]) >= cfg.per_prompt_min_count
        population = torch.tensor(latest[prompt] if enough else rewards, dtype=torch.float64)
        advantage = (reward - population.mean()) / (population.std(correction=0) + 1e-6)
        advantages.append(float(advantage.clamp(-cfg.adv_clip_max, cfg.adv_clip_max)))
    return advantages, latest


def main(argv: list[str] | None = None) -> None:
    command(Config, train, argv)


if __name__ == "__main__":
    main()
