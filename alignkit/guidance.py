"""Pictures that a reward likes better, without training: its gradient is followed while they are drawn.

`ascend` moves the noise that a picture starts from. ReNO, Eyring et al. 2024, arXiv 2406.04312:

    repeat   x_T <- x_T + learning_rate * clip(gradient of R(G(x_T)) + regularization * K(x_T))
    K(x_T) = (d - 1) log |x_T| - |x_T|^2 / 2, the log density of the norm of d numbers of noise
    and the x_T of the highest reward is kept

`steered` moves every step. With g the gradient at x_t of R(D(x_0)), x_0 being predicted in one step (noise.py),

    eps <- eps - scale * sigma_t * sqrt(d) * g / |g|

which is classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2) by a judge of clean images, as in
universal guidance (Bansal et al. 2023, arXiv 2302.07121) and before it Plug & Play Generative Networks (Nguyen et al.
2017, arXiv 1612.00005). These take g as it is; here its length is set to that of noise, so that `scale` means the same
for every reward.

Both run the stock pipeline's own `__call__`, without the `torch.no_grad` around it. ReNO's authors have one-step
models; of more steps, the gradient goes through all of them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignkit.artifacts import network_of
from alignkit.base import decode_latents, require_finite
from alignkit.marker import controlnets_of
from alignkit.noise import NoiseSchedule

NO_SIGNAL = 1e-3  # an alpha_t below it is meant to be 0 (Euler has 2^-12 there); that of SD's last timestep is 0.07
Score = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B], with gradient


# The noise it starts from


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent on the initial noise; the authors' settings."""

    steps: int = 50
    """Each costs a whole picture, forwards and backwards."""
    learning_rate: float = 5.0
    momentum: float = 0.9
    """Nesterov's."""
    clip: float = 0.1
    """Norm of the gradient of one picture, at most."""
    regularization: float = 0.01
    """Weight of K."""

    def __post_init__(self):
        if self.steps < 0 or self.learning_rate <= 0 or self.clip <= 0 or self.regularization < 0:
            raise ValueError(f"Expected steps and regularization of at least 0 and all else above 0, got {self}.")


def norm_log_density(noise: Tensor) -> Tensor:
    """K of noise [B, ...], up to a constant -> [B]. Its maximum is where |x| = sqrt(d - 1)."""
    norm = noise.flatten(1).norm(dim=1)
    return (noise[0].numel() - 1) * norm.log() - norm.square() / 2


def ascend(x_T: Tensor, draw: Callable[[Tensor], Tensor], score: Score, ascent: Ascent) -> tuple[Tensor, Tensor]:
    """The best noise on the way from x_T [B, ...], and the rewards of the whole way [steps + 1, B].

    `draw`: noise -> images [B, 3, H, W], with gradient, image i from noise i alone. So the best is never worse than
    what x_T itself gives. Raises ValueError where a gradient is not finite.
    """
    noise = nn.Parameter(x_T.detach().float().clone())
    optimizer = torch.optim.SGD(
        [noise], ascent.learning_rate, momentum=ascent.momentum, nesterov=ascent.momentum > 0, maximize=True
    )
    best, history = x_T.detach().clone(), []
    for step in range(ascent.steps + 1):
        last = step == ascent.steps
        with torch.set_grad_enabled(not last):
            rewards = score(draw(noise.to(x_T.dtype)))
            objective = rewards + ascent.regularization * norm_log_density(noise)
        rewards = rewards.detach()
        if history:
            better = rewards > torch.stack(history).amax(0)
            best[better] = noise.detach()[better].to(best.dtype)
        history.append(rewards)
        if last:
            break
        (gradient,) = torch.autograd.grad(objective.sum(), noise)
        norm = _norm(gradient)
        if not norm.isfinite().all():
            raise ValueError("The gradient of the reward is not finite: take fewer inference steps or float32.")
        noise.grad = gradient * (ascent.clip / norm.clamp(min=1e-12)).clamp(max=1)
        optimizer.step()
    return best, torch.stack(history)


# Every step


def steer(
    model_output: Tensor, gradient: Tensor, schedule: NoiseSchedule, timestep: int | Tensor, scale: float
) -> Tensor:
    """The model output with eps moved against the reward's gradient at x_t; all [B, ...].

    At a given x_t, v and flow move by 1 / alpha_t of what eps does. Where alpha_t is 0, which is how chains with zero
    terminal SNR begin, x_t is its own eps, and nothing moves.
    """
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(timestep))
    if alpha < NO_SIGNAL:
        return model_output
    norm = _norm(gradient)
    if not norm.isfinite().all():
        raise ValueError("The gradient of the reward is not finite: take a smaller reward_scale or float32.")
    direction = torch.where(norm > 0, gradient / norm.clamp(min=1e-30), 0) * gradient[0].numel() ** 0.5
    factor = scale * sigma / (1 if schedule.prediction_type == "epsilon" else alpha)
    return model_output - factor * direction.to(model_output.dtype)


@contextmanager
def steered(pipe: Any, score: Score, scale: float) -> Iterator[None]:
    """Inside, a call of `with_gradient(pipe)` is steered at every step of its scheduler."""
    scheduler = pipe.scheduler
    schedule, original = NoiseSchedule.from_scheduler(scheduler), scheduler.step

    @functools.wraps(original)  # the pipeline looks at its arguments
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not sample.requires_grad:  # a second evaluation at the last timestep
            return original(model_output, timestep, sample, *args, **kwargs)
        t = _timestep(timestep, schedule)
        x_t = scheduler.scale_model_input(sample, timestep)  # of schedulers that keep x_0 + sigma noise
        images = decode_latents(pipe.vae, schedule.predict_x_0(model_output, x_t, t))
        shown = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(shown).sum(), shown)
        # its length does not count: at 1, half precision carries it through the networks, whatever the reward's scale
        (gradient,) = torch.autograd.grad(images, sample, gradient / _norm(gradient).clamp(min=1e-30))
        with torch.no_grad():
            model_output = steer(model_output, gradient, schedule, t, scale)
            stepped = original(model_output.detach(), timestep, sample.detach(), *args, **kwargs)
        x_prev = stepped[0].detach().requires_grad_(bool(timestep != scheduler.timesteps[-1]))  # the next graph's start
        return (x_prev, *stepped[1:]) if isinstance(stepped, tuple) else replace(stepped, prev_sample=x_prev)

    scheduler.step = step
    try:
        with starting_from(pipe, lambda x_T: x_T.detach().requires_grad_()):
            yield
    finally:
        del scheduler.step


# A stock pipeline with gradient


@contextmanager
def starting_from(pipe: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the pipeline's initial latents [B, C, h, w] pass through `change`."""
    original = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: change(original(*args, **kwargs))
    try:
        yield
    finally:
        del pipe.prepare_latents


class _Start(Exception):
    """Carries the initial latents out of a pipeline that has drawn nothing but them."""


def initial_latents(pipe: Any, *args: Any, **options: Any) -> Tensor:
    """[B, C, h, w], those that this call of the pipeline starts from."""

    def stop(x_T: Tensor) -> Tensor:
        raise _Start(x_T)

    try:
        with starting_from(pipe, stop):
            pipe(*args, **options)
    except _Start as start:
        return start.args[0]
    raise ValueError(f"A {type(pipe).__name__} does not start from noise.")


@contextmanager
def with_gradient(pipe: Any) -> Iterator[Callable[..., Any]]:
    """Inside, the pipeline's `__call__` without its `no_grad`; no weight gets a gradient, and all is restored."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    frozen = [p for module in modules for p in module.parameters() if p.requires_grad]
    with ExitStack() as stack:
        for parameter in frozen:
            stack.callback(parameter.requires_grad_)
            parameter.requires_grad_(False)
        for part in (pipe.unet, pipe.vae, *controlnets_of(pipe)):
            if not part.is_gradient_checkpointing:
                stack.callback(part.disable_gradient_checkpointing)
                part.enable_gradient_checkpointing()
        if pipe.unet.device.type == "cpu":  # there, the fused attention's backward takes twice the time
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        yield functools.partial(type(pipe).__call__.__wrapped__, pipe)


def best_noise(
    pipe: Any, prompt: Any, score: Score, ascent: Ascent, fresh: Callable[[], Mapping[str, Any]]
) -> tuple[Tensor, Tensor]:
    """`ascend` for a call of the pipeline: latents to start from, and the rewards of the way.

    `fresh` gives the call's options, with new generators each time.
    """
    x_T = initial_latents(pipe, prompt, **fresh())
    # K is of noise of deviation 1, and schedulers that keep x_0 + sigma noise start from more: how much, they know of
    # the timesteps that this call has set
    unit = float(pipe.scheduler.init_noise_sigma)

    with with_gradient(pipe) as call:

        def draw(noise: Tensor) -> Tensor:
            with starting_from(pipe, lambda _: noise * unit):
                latents = call(prompt, **fresh() | {"output_type": "latent", "return_dict": False})[0]
            return decode_latents(pipe.vae, latents)

        noise, rewards = ascend(x_T / unit, draw, score, ascent)
    return noise * unit, rewards


# Pictures by a reward


@dataclass(frozen=True)
class RewardSearch:
    """What is wanted of pictures: the best of so many by `score`, each with its gradient followed or not."""

    score: Score
    best_of: int = 1
    ascent: Ascent = Ascent(steps=0)
    scale: float = 0.0

    def check(self, pipe: Any, reward: nn.Module, options: Mapping[str, Any]) -> None:
        """Raises ValueError where `draw_best` cannot do it."""
        if self.best_of < 1 or self.scale < 0:
            raise ValueError(
                f"Expected best_of of at least 1, reward_scale of at least 0, got {self.best_of}, {self.scale}."
            )
        if self.ascent.steps and self.scale:
            raise ValueError("ascent and reward_scale are two ways to follow one gradient: set one of them to 0.")
        if self.ascent.steps or self.scale:
            if getattr(pipe, "unet", None) is None:
                raise ValueError(f"Gradients of rewards: expected SD 1.x, SD 2.x or SDXL, got a {type(pipe).__name__}.")
            if any(hasattr(part, "_hf_hook") for part in pipe.components.values()):
                raise ValueError(
                    "Gradients of rewards go backwards through U-Net and VAE, which are not both on the device when "
                    "they are offloaded: draw without offloading, or use the reward with best_of alone."
                )
            for term in getattr(reward, "rewards", [reward]):
                if not term.differentiable:
                    raise ValueError(f"{type(term).__name__} has no gradient to follow: use it with best_of alone.")
        if options.get("generator") is not None or options.get("latents") is not None:
            raise ValueError("A reward draws the same noise more than once: pass a seed, not a generator or latents.")
        if options.get("return_dict") is False or options.get("output_type") == "latent":
            raise ValueError("A reward sees images: leave return_dict true, and output_type at pil, pt or np.")


def draw_best(
    pipe: Any, prompt: Any, seed: int, number: int, search: RewardSearch, options: Mapping[str, Any]
) -> tuple[Tensor, list[int], Tensor, list[bool] | None]:
    """`number` images [B, 3, H, W] in [0, 1] of the prompts, their seeds, rewards [B] and what a safety checker says.

    Image i is the best of those from the seeds seed + best_of * i, ..., seed + best_of * i + best_of - 1. One that a
    safety checker objects to is taken only where there is no other; its reward is -inf.
    """
    rounds = []
    for k in range(search.best_of):
        seeds = [seed + search.best_of * i + k for i in range(number)]
        output = _draw_once(pipe, prompt, seeds, search, options)
        require_finite(output.images, network_of(pipe).dtype)
        flagged = getattr(output, "nsfw_content_detected", None)
        with torch.no_grad():
            rewards = search.score(output.images.float().clamp(0, 1))
        if flagged:
            rewards = rewards.masked_fill(torch.tensor(flagged, device=rewards.device), -torch.inf)
        rounds.append((output.images, seeds, rewards, flagged))
    images, seeds, rewards, flagged = zip(*rounds, strict=True)
    best = torch.stack(rewards).max(0)
    chosen = list(enumerate(best.indices.tolist()))
    return (
        torch.stack([images[k][i] for i, k in chosen]),
        [seeds[k][i] for i, k in chosen],
        best.values,
        [flagged[k][i] for i, k in chosen] if flagged[0] else None,
    )


def _draw_once(pipe: Any, prompt: Any, seeds: list[int], search: RewardSearch, options: Mapping[str, Any]) -> Any:
    def fresh() -> dict[str, Any]:
        return {**options, "generator": generators(seeds), "output_type": "pt"}

    if search.ascent.steps:
        x_T, _ = best_noise(pipe, prompt, search.score, search.ascent, fresh)
        with starting_from(pipe, lambda _: x_T):
            return pipe(prompt, **fresh())
    if search.scale:
        with with_gradient(pipe) as call, steered(pipe, search.score, search.scale):
            return call(prompt, **fresh())
    return pipe(prompt, **fresh())


def generators(seeds: list[int]) -> list[torch.Generator]:
    """One an image, on the CPU: so an image does not depend on the device, nor on how many there are."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def as_ascent(ascent: int | Mapping[str, Any] | Ascent) -> Ascent:
    """Its number of steps, its settings, or itself."""
    if isinstance(ascent, Ascent):
        return ascent
    return Ascent(**ascent) if isinstance(ascent, Mapping) else Ascent(steps=ascent)


def _timestep(timestep: Any, schedule: NoiseSchedule) -> Any:
    timestep = torch.as_tensor(timestep)
    if schedule.is_flow or not timestep.is_floating_point():
        return timestep
    if timestep != timestep.round():
        raise ValueError(f"Steering needs a scheduler of whole timesteps, got {float(timestep)}: take DDIM.")
    return timestep.long()


def _norm(gradient: Tensor) -> Tensor:
    """[B, 1, ...] of [B, ...]."""
    return gradient.flatten(1).norm(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))
