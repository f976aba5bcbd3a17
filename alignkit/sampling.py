"""A denoising loop that keeps the gradient of the steps a plan names.

AlignProp, DRaFT-K, DRaFT-LV, ReFL, DRTune and TRL's trainer differ only in which steps carry gradient, in what is cut
off there, and in whether the reward sees x_0 or a predicted x_0. So the loop is written once and the difference is
data: a `GradientPlan`. `PLANS` holds the published ones; drawing is all that happens there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from alignkit.noise import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, C, H, W], timestep) -> model output [B, C, H, W]
Condition = Tensor | Mapping[str, Tensor]  # prompt embeddings, or all that a network reads beside them; [B, ...] each
Forward = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t, timestep, condition) -> model output
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class GradientPlan:
    """Which steps of a chain of N keep their gradient. Step 0 is the noisiest, step N - 1 the last.

    Steps before the first of `steps` run without a graph. A later step that is not in `steps` runs its network without
    one too, but lets gradient pass along the linear part of the DDIM step, from x_prev to x_t.

    Raises:
        ValueError: if it keeps no step, keeps one outside the chain or behind `stop`, or makes no sense otherwise.
    """

    num_inference_steps: int
    steps: tuple[int, ...]
    detach_input: bool = False  # DRTune: x_t enters the network without gradient
    stop: int | None = None  # ReFL, DRTune: return the predicted x_0 of this step instead of going on
    lv_copies: int = 0  # DRaFT-LV: re-noised copies of the last step beside the chain's own

    def __post_init__(self):
        last = self.num_inference_steps - 1 if self.stop is None else self.stop
        if not 0 <= last < self.num_inference_steps:
            raise ValueError(f"stop must be a step between 0 and {self.num_inference_steps - 1}, got {self.stop}.")
        if not self.steps:
            raise ValueError("A gradient plan needs at least one step with gradient; this one keeps none (K = 0).")
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"The steps of a plan must ascend without repetition, got {self.steps}.")
        if self.steps[0] < 0 or self.steps[-1] > last:
            raise ValueError(f"The steps of a plan must lie between 0 and {last}, got {self.steps}.")
        if self.lv_copies < 0:
            raise ValueError(f"lv_copies must not be negative, got {self.lv_copies}.")
        if self.lv_copies and self.stop is not None:
            raise ValueError("lv_copies repeat the last step, so they cannot be combined with stop.")


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"K, the steps with gradient, must be between 1 and num_inference_steps {n}, got {k}.")


def _suffix(n: int, k: int) -> tuple[int, ...]:
    _check_k(k, n)
    return tuple(range(n - k, n))


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    """Both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def alignprop(
    num_inference_steps: int,
    generator: torch.Generator,
    distribution: str = "uniform",
    k: int | None = None,
    mean: float | None = None,
    std: float | None = None,
) -> GradientPlan:
    """Randomised truncated backpropagation: the last K steps, K drawn once for the whole trajectory.

    AlignProp, Prabhudesai et al. 2023, arXiv 2310.03739. `distribution` is "uniform" (K from 1 to N, the paper's),
    "gaussian" (the first step with gradient is int(Normal(mean, std)) within 1 to N - 1, as in the authors' later code,
    whose 42 and 5 of 50 steps are the default in proportion), or "fixed" (K = k).
    """
    n = num_inference_steps
    if (k is not None) != (distribution == "fixed"):
        raise ValueError(f"k is the setting of distribution fixed and of no other, got {distribution!r} with k = {k}.")
    if distribution != "gaussian" and (mean, std) != (None, None):
        raise ValueError(f"mean and std are settings of distribution gaussian, got {distribution!r}.")
    if distribution == "uniform":
        k = _randint(1, n, generator)
    elif distribution == "gaussian":
        mean, std = 0.84 * n if mean is None else mean, 0.1 * n if std is None else std
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}.")
        # the rejection loop of the authors' code, in closed form: it never ends if the mean is far outside
        edges = torch.special.ndtr((torch.arange(1, n + 1, dtype=torch.float64) - mean) / std)
        weights = edges.diff()  # of first steps 1 .. N - 1
        if n < 2 or not weights.sum() > 1e-6:
            raise ValueError(f"Normal({mean}, {std}) does not reach the steps 1 to {n - 1}: change mean or std.")
        k = n - 1 - int(torch.multinomial(weights, 1, generator=generator))
    elif distribution != "fixed":
        raise ValueError(f"distribution must be uniform, gaussian or fixed, got {distribution!r}.")
    return GradientPlan(n, _suffix(n, k))


def full(num_inference_steps: int, generator: torch.Generator) -> GradientPlan:
    """Backpropagation through the whole chain; collapses within two epochs according to AlignProp."""
    return GradientPlan(num_inference_steps, tuple(range(num_inference_steps)))


def stochastic_detach(num_inference_steps: int, generator: torch.Generator) -> GradientPlan:
    """Step i keeps its gradient with probability (i + 1) / (N + 1), drawn anew for every step.

    AlignProp's first code and TRL 0.9 to 0.23. Not a suffix: a kept early step reaches x_0 through later cut ones along
    the linear part alone, which is a larger and different gradient. For reproducing their numbers. A draw that keeps
    nothing is drawn again.
    """
    n = num_inference_steps
    steps = ()
    while not steps:
        steps = tuple(i for i in range(n) if _randint(0, n, generator) <= i)
    return GradientPlan(n, steps)


def draft_k(num_inference_steps: int, generator: torch.Generator, k: int = 1) -> GradientPlan:
    """The last k steps. DRaFT-K, Clark et al. 2024, arXiv 2309.17400."""
    return GradientPlan(num_inference_steps, _suffix(num_inference_steps, k))


def draft_lv(num_inference_steps: int, generator: torch.Generator, copies: int = 2) -> GradientPlan:
    """The last step, and `copies` of it from re-noised x_0. DRaFT-LV, Clark et al. 2024, arXiv 2309.17400.

    What it gains depends on the last noise level: little with "leading" spacing (t = 1), much with "trailing".
    """
    return GradientPlan(num_inference_steps, _suffix(num_inference_steps, 1), lv_copies=copies)


def refl(num_inference_steps: int, generator: torch.Generator, first_stop: int | None = None) -> GradientPlan:
    """One step with gradient, uniform in [first_stop, N - 1]; the reward sees its predicted x_0.

    ReFL, Xu et al. 2023, arXiv 2304.05977: step 30 to 39 of 40 there, so three quarters of N is the default.
    """
    first_stop = num_inference_steps * 3 // 4 if first_stop is None else first_stop
    if not 0 <= first_stop < num_inference_steps:
        raise ValueError(f"first_stop must be between 0 and {num_inference_steps - 1}, got {first_stop}.")
    step = _randint(first_stop, num_inference_steps - 1, generator)
    return GradientPlan(num_inference_steps, (step,), stop=step)


def drtune(
    num_inference_steps: int, generator: torch.Generator, k: int = 3, early_stop_ratio: float = 0.4
) -> GradientPlan:
    """k equally spaced steps, network inputs detached; the reward sees the predicted x_0 of a random stop.

    DRTune, Wu et al. 2024, arXiv 2405.00760. The stop is uniform in the last `early_stop_ratio` of the chain (0: run it
    to the end) and drawn first, so that all k steps lie before it; the first of them is uniform in what room is left.
    """
    n = num_inference_steps
    _check_k(k, n)
    if not 0 <= early_stop_ratio <= 1:
        raise ValueError(f"early_stop_ratio must be between 0 and 1, got {early_stop_ratio}.")
    stops = round(early_stop_ratio * n)
    stop = n - _randint(1, stops, generator) if stops else None
    length = n if stop is None else stop + 1
    k = min(k, length)
    stride = length // k
    start = _randint(0, length - 1 - (k - 1) * stride, generator)
    return GradientPlan(n, tuple(start + i * stride for i in range(k)), detach_input=True, stop=stop)


PLANS: dict[str, Callable[..., GradientPlan]] = {
    "alignprop": alignprop,
    "full": full,
    "stochastic_detach": stochastic_detach,
    "draft_k": draft_k,
    "draft_lv": draft_lv,
    "refl": refl,
    "drtune": drtune,
}


def guided(
    forward: Forward,
    condition: Condition,
    negative_condition: Condition | None,
    guidance_scale: float,
    detach_uncond: bool = False,
) -> Denoiser:
    """Classifier-free guidance, uncond + guidance_scale (cond - uncond), batched. Ho & Salimans 2022, eq. 6.

    The conditions are prompt embeddings [B, S, D] or dicts of tensors [B, ...]. With guidance_scale <= 1 there is no
    guidance and the unconditional half is not computed, as in diffusers. `detach_uncond` cuts the gradient through it.
    """
    if guidance_scale <= 1:
        return lambda x_t, timestep: forward(x_t, timestep, condition)
    if _shapes(negative_condition) != _shapes(condition):
        raise ValueError(
            f"guidance_scale {guidance_scale} needs a negative condition of the shape of the condition, "
            f"{_shapes(condition)}; got {_shapes(negative_condition)}."
        )
    if isinstance(condition, Mapping):
        both = {name: torch.cat([negative_condition[name], tensor]) for name, tensor in condition.items()}
    else:
        both = torch.cat([negative_condition, condition])

    def denoiser(x_t: Tensor, timestep: Tensor) -> Tensor:
        uncond, cond = forward(torch.cat([x_t, x_t]), timestep, both).chunk(2)
        if detach_uncond:
            uncond = uncond.detach()
        return uncond + guidance_scale * (cond - uncond)

    return denoiser


def _shapes(condition: Condition | None):
    if isinstance(condition, Mapping):
        return {name: list(tensor.shape) for name, tensor in condition.items()}
    return None if condition is None else list(condition.shape)


def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    plan: GradientPlan | None,
    *,
    eta: float = 0.0,
    generator: Generators = None,
    checkpoint: bool = True,
) -> Tensor:
    """Denoises x_T [B, C, H, W] along timesteps [N], keeping the gradient that the plan names (None: no gradient).

    Returns x_0 [B, C, H, W]; with lv_copies = n, [(1 + n) B, C, H, W], the chain's own batch first, then copy by copy.
    With `checkpoint`, memory holds one step's activations at a time, at the price of computing each kept step twice.
    `generator` draws the noise of eta > 0 and of lv_copies: one, or one per sample so that a sample does not depend on
    its batch.
    """
    if plan is not None and plan.num_inference_steps != len(timesteps):
        raise ValueError(f"The plan is for {plan.num_inference_steps} steps, but there are {len(timesteps)} timesteps.")
    if generator is None and (eta > 0 or (plan and plan.lv_copies)):
        raise ValueError("eta > 0 and lv_copies draw noise: pass a generator, or one per sample.")
    kept = plan.steps if plan and torch.is_grad_enabled() else ()

    def model_output(x_t: Tensor, i: int) -> Tensor:
        if i not in kept:
            with torch.no_grad():
                return denoiser(x_t, timesteps[i])
        x_t = x_t.detach() if plan.detach_input else x_t
        if not checkpoint:
            return denoiser(x_t, timesteps[i])
        # the timestep travels as an argument: a closure over the loop's variable would recompute every step at the last
        # one. Non-reentrant, because x_T has no gradient and the reentrant form then drops the parameters' too.
        return recompute_in_backward(denoiser, x_t, timesteps[i], use_reentrant=False)

    def draw() -> Tensor:
        generators = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor(x_T.shape, generator=generators, device=x_T.device, dtype=x_T.dtype)

    x_t = x_T
    for i, timestep in enumerate(timesteps):
        prev_timestep = timesteps[i + 1] if i + 1 < len(timesteps) else None
        with torch.set_grad_enabled(bool(kept) and i >= kept[0]):
            # drawn here and not in the network's call, which would draw again when it is recomputed
            noise = draw() if eta > 0 else None
            output = model_output(x_t, i)
            if plan and i == plan.stop:
                return schedule.predict_x_0(output, x_t, timestep)
            x_t = schedule.ddim_step(x_t, output, timestep, prev_timestep, eta, noise)
    x_0 = x_t

    copies = [x_0]
    for _ in range(plan.lv_copies if plan else 0):
        x_t = schedule.add_noise(x_0.detach(), draw(), timesteps[-1])
        noise = draw() if eta > 0 else None
        copies.append(schedule.ddim_step(x_t, model_output(x_t, len(timesteps) - 1), timesteps[-1], None, eta, noise))
    return torch.cat(copies)
