"""The closed form of a noise schedule: one object for epsilon, v and flow-matching models.

Every family here mixes image and noise linearly, x_t = alpha_t x_0 + sigma_t noise; they differ in the two coefficients
and in what the network predicts:

| prediction_type   | alpha_t, sigma_t               | model output                | source                            |
|-------------------|--------------------------------|-----------------------------|-----------------------------------|
| "epsilon"         | sqrt(abar_t), sqrt(1 - abar_t) | noise                       | DDPM, Ho et al. 2020, eq. 4, 14   |
| "v_prediction"    | the same                       | alpha_t noise - sigma_t x_0 | Salimans & Ho 2022, section 4     |
| "flow_prediction" | 1 - t/T, t/T                   | noise - x_0                 | rectified flow, Esser et al. 2024 |

Nothing here keeps state between calls, so any of it may be differentiated, recomputed under checkpointing, or called
for one step in the middle of a chain. A diffusers scheduler allows none of the three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
UNSUPPORTED_FLOW_OPTIONS = (
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha_t and sigma_t of every timestep, and what follows from them.

    A timestep is an int, or an integer tensor that is a scalar or [B] (floating point for a flow model). Latents are
    [B, ...]; whatever their dtype, the maths runs in float32 at least and returns that: alpha_t near the end of a chain
    is 0.9996, which bfloat16 rounds to 1.
    """

    prediction_type: str
    num_train_timesteps: int = 1000
    alphas_cumprod: Tensor | None = None  # [T] float64, abar_t; None for a flow model
    final_alpha_cumprod: float = 1.0  # abar after the last step; SD 1.x uses abar_0, not 1
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    shift: float = 1.0  # flow only: sigma -> shift sigma / (1 + (shift - 1) sigma)
    # flow only: last and first sigma before the shift; None: 1/N, 1
    sigma_range: tuple[float, float] | None = (0.0, 1.0)
    # flow only: two points (image tokens, log shift) of a line that gives the shift of any size of image
    dynamic_shift: tuple[tuple[int, float], tuple[int, float]] | None = None

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}.")
        if (self.alphas_cumprod is None) != (self.prediction_type == "flow_prediction"):
            raise ValueError(f"{self.prediction_type} {'takes no' if self.is_flow else 'needs'} alphas_cumprod.")

    @classmethod
    def from_scheduler(cls, scheduler) -> "NoiseSchedule":
        """Reads any diffusers scheduler that carries `alphas_cumprod` (DDIM, PNDM, DDPM, Euler, DPM-Solver, ...) or is
        a FlowMatchEulerDiscreteScheduler. It samples with DDIM (Euler for flow) then, whichever was loaded.

        `clip_sample` is ignored, as diffusers' own latent pipelines do: latents have no range to be clipped to.

        Raises:
            ValueError: for a schedule that has no closed form here (dynamic thresholding, Karras sigmas).
        """
        config = scheduler.config
        if type(scheduler).__name__.startswith("FlowMatch"):
            unsupported = [key for key in UNSUPPORTED_FLOW_OPTIONS if config.get(key)]
            if unsupported:
                raise ValueError(f"Only flow schedules with a plain shift are supported; this one sets {unsupported}.")
            dynamic_shift = None
            if config.use_dynamic_shifting:
                if config.time_shift_type != "exponential":
                    raise ValueError(f"time_shift_type must be exponential, got {config.time_shift_type!r}.")
                dynamic_shift = (
                    (config.base_image_seq_len, config.base_shift),
                    (config.max_image_seq_len, config.max_shift),
                )
            return cls(
                "flow_prediction",
                config.num_train_timesteps,
                shift=scheduler.shift,
                sigma_range=(scheduler.sigma_min, scheduler.sigma_max),
                dynamic_shift=dynamic_shift,
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod. Supported: diffusers' discrete-time schedulers "
                "(DDIM, DDPM, PNDM, Euler, DPM-Solver) and FlowMatchEulerDiscreteScheduler."
            )
        if config.get("thresholding"):
            raise ValueError("Dynamic thresholding is for pixel-space models; set thresholding to false.")
        alphas_cumprod = scheduler.alphas_cumprod.double().cpu()
        return cls(
            config.get("prediction_type", "epsilon"),
            config.num_train_timesteps,
            alphas_cumprod,
            1.0 if config.get("set_alpha_to_one", True) else alphas_cumprod[0].item(),
            config.get("timestep_spacing", "leading"),
            config.get("steps_offset", 0),
        )

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow_prediction"

    def alpha_sigma(self, timestep: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), float64, shaped like the timestep. None is the end of the chain, after its last step."""
        if timestep is None:
            alpha_squared = torch.tensor(self.final_alpha_cumprod, dtype=torch.float64)
            return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        timestep = torch.as_tensor(timestep)
        if self.is_flow:
            sigma = timestep.double() / self.num_train_timesteps
            return 1 - sigma, sigma
        if timestep.is_floating_point():
            # in bfloat16, 37 of DDIM's 50 timesteps are other numbers (981 becomes 980)
            raise TypeError(f"Timesteps of an {self.prediction_type} model are integers, got {timestep.dtype}.")
        alpha_squared = self.alphas_cumprod.to(timestep.device)[timestep]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def alpha(self, timestep: int | Tensor) -> Tensor:
        return self.alpha_sigma(timestep)[0]

    def sigma(self, timestep: int | Tensor) -> Tensor:
        return self.alpha_sigma(timestep)[1]

    def snr(self, timestep: int | Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2: comparable across families as timesteps are not. float64, shaped like timestep."""
        alpha, sigma = self.alpha_sigma(timestep)
        return (alpha / sigma) ** 2

    def min_snr_weight(self, timestep: int | Tensor, gamma: float) -> Tensor:
        """Min-SNR-gamma, Hang et al. 2023, arXiv 2303.09556: what makes the squared error of the model's output the
        squared error in x_0 times min(SNR, gamma). float64, shaped like the timestep.

        For epsilon min(SNR, gamma) / SNR, for v (section 3.4) min(SNR, gamma) / (SNR + 1).
        """
        alpha, sigma = self.alpha_sigma(timestep)
        x_0_per_output = sigma / alpha if self.prediction_type == "epsilon" else sigma
        return self.snr(timestep).clamp(max=gamma) * x_0_per_output**2

    def add_noise(self, x_0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise; [B, ...]."""
        _same_shape(x_0=x_0, noise=noise)
        alpha, sigma = self._coefficients(timestep, x_0)
        return alpha * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """What a perfect network outputs for add_noise(x_0, noise, timestep); [B, ...]."""
        _same_shape(x_0=x_0, noise=noise)
        if self.prediction_type == "epsilon":
            return noise
        if self.is_flow:
            return noise - x_0
        alpha, sigma = self._coefficients(timestep, x_0)
        return alpha * noise - sigma * x_0

    def predict_x_0(self, model_output: Tensor, x_t: Tensor, timestep: int | Tensor) -> Tensor:
        """The x_0 that the model output implies, in one step; [B, ...]. DDIM, Song et al. 2021, eq. 9, for epsilon."""
        _same_shape(model_output=model_output, x_t=x_t)
        alpha, sigma = self._coefficients(timestep, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * model_output) / alpha
        if self.is_flow:
            return x_t - sigma * model_output
        return alpha * x_t - sigma * model_output

    def predict_noise(self, model_output: Tensor, x_t: Tensor, timestep: int | Tensor) -> Tensor:
        """The noise that the model output implies; [B, ...]."""
        _same_shape(model_output=model_output, x_t=x_t)
        if self.prediction_type == "epsilon":
            return model_output
        alpha, sigma = self._coefficients(timestep, x_t)
        if self.is_flow:
            return x_t + alpha * model_output
        return alpha * model_output + sigma * x_t

    def timesteps(self, num_inference_steps: int, image_tokens: int | None = None) -> Tensor:
        """[N], descending, as diffusers' DDIMScheduler (int64) or FlowMatchEulerDiscreteScheduler (float32) sets.

        `image_tokens`: how many the network sees of an image, needed with dynamic_shift (Esser et al. 2024, section
        5.3.2: larger images need more noise to be as unrecognisable).
        """
        n, total = num_inference_steps, self.num_train_timesteps
        if not 1 <= n <= total:
            raise ValueError(f"num_inference_steps must be between 1 and {total}, got {n}.")
        index = torch.arange(n, dtype=torch.float64)
        if self.is_flow:
            low, high = self.sigma_range or (1 / n, 1.0)
            sigma = high + (low - high) * index / max(n - 1, 1)
            shift = self.shift if self.dynamic_shift is None else self._shift_of(image_tokens)
            return (shift * sigma / (1 + (shift - 1) * sigma) * total).float()
        if self.timestep_spacing == "leading":
            timesteps = (index * (total // n)).flip(0) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            # not index * (total / n): this rounds as numpy's arange does, where diffusers' timesteps come from
            timesteps = (total + index * ((total - total / n) - total)).round() - 1
        elif self.timestep_spacing == "linspace":
            timesteps = (index * ((total - 1) / max(n - 1, 1))).round().flip(0)
        else:
            raise ValueError(f"timestep_spacing must be leading, trailing or linspace, got {self.timestep_spacing!r}.")
        if timesteps[0] >= total:
            raise ValueError(f"{n} steps with steps_offset {self.steps_offset} run past the last of {total} timesteps.")
        return timesteps.long()

    def _shift_of(self, image_tokens: int | None) -> float:
        if image_tokens is None:
            raise ValueError("The shift of this schedule depends on the size of the image: pass image_tokens.")
        (base_tokens, base_log), (max_tokens, max_log) = self.dynamic_shift
        return math.exp(base_log + (max_log - base_log) * (image_tokens - base_tokens) / (max_tokens - base_tokens))

    def ddim_step(
        self,
        x_t: Tensor,
        model_output: Tensor,
        timestep: int | Tensor,
        prev_timestep: int | Tensor | None,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x_t -> x_prev, [B, ...], differentiable and without state. DDIM, Song et al. 2021, eq. 12 and 16.

        `prev_timestep` is the next entry of timesteps(); None after the last. diffusers subtracts T // N instead, which
        is the same for "leading" and wherever N divides T, and otherwise names a noise level that x_prev is then not
        evaluated at. For a flow model at eta 0 this is the Euler step x_t + (sigma_prev - sigma_t) v.
        `eta` > 0 needs `noise`, drawn by the caller: 1 is DDPM's ancestral step.
        """
        mean, std = self.ddim_mean_std(x_t, model_output, timestep, prev_timestep, eta)
        if eta == 0:
            return mean
        if noise is None:
            raise ValueError(f"eta {eta} needs noise of the shape of x_t, {list(x_t.shape)}; got None.")
        _same_shape(noise=noise, x_t=x_t)
        return mean + _expand(std, x_t) * noise

    def ddim_mean_std(
        self,
        x_t: Tensor,
        model_output: Tensor,
        timestep: int | Tensor,
        prev_timestep: int | Tensor | None,
        eta: float,
    ) -> tuple[Tensor, Tensor]:
        """(mean [B, ...], standard deviation, as `ddim_std`) of the normal distribution that x_prev is drawn from."""
        x_0 = self.predict_x_0(model_output, x_t, timestep)
        predicted_noise = self.predict_noise(model_output, x_t, timestep)
        alpha_prev, sigma_prev = self.alpha_sigma(prev_timestep)
        std = self.ddim_std(timestep, prev_timestep, eta)
        direction = (sigma_prev**2 - std**2).clamp(min=0).sqrt()
        return _expand(alpha_prev, x_t) * x_0 + _expand(direction, x_t) * predicted_noise, std

    def ddim_std(self, timestep: int | Tensor, prev_timestep: int | Tensor | None, eta: float) -> Tensor:
        """Standard deviation of the noise of a step; float64, shaped like the timestep. 0 where the step has none."""
        (alpha, sigma), (alpha_prev, sigma_prev) = self.alpha_sigma(timestep), self.alpha_sigma(prev_timestep)
        if eta == 0:
            return torch.zeros_like(sigma)
        # eq. 16 for any alpha and sigma: with alpha^2 + sigma^2 = 1 the root is sqrt(1 - abar_t / abar_prev)
        return eta * sigma_prev / sigma * (sigma**2 - (alpha / alpha_prev * sigma_prev) ** 2).clamp(min=0).sqrt()

    def ddim_log_prob(
        self,
        x_prev: Tensor,
        x_t: Tensor,
        model_output: Tensor,
        timestep: int | Tensor,
        prev_timestep: int | Tensor | None,
        eta: float = 1.0,
    ) -> Tensor:
        """log p(x_prev | x_t), the density of a step with noise, [B]: the sum over all numbers of a sample.

        DDPO, Black et al. 2023, section 4.3: x_t -> x_prev is the policy of a Markov decision process.

        Raises:
            ValueError: the step has no noise, so that x_prev has no density: eta is 0, or it is the last step of a
                schedule that ends at 0 noise.
        """
        _same_shape(x_prev=x_prev, x_t=x_t)
        mean, std = self.ddim_mean_std(x_t, model_output, timestep, prev_timestep, eta)
        if not (std > 0).all():
            raise ValueError(f"The step {timestep} -> {prev_timestep} at eta {eta} has no noise, and so no density.")
        std = _expand(std, x_t)
        log_density = -0.5 * ((x_prev - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(1).sum(1)

    def _coefficients(self, timestep: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(timestep)
        return _expand(alpha, x), _expand(sigma, x)


def draw_noise(shape: Sequence[int], generator: torch.Generator, noise_offset: float = 0.0) -> Tensor:
    """N(0, 1) of a sample [C, h, w]; with an offset, plus that much of one N(0, 1) for each channel."""
    noise = torch.randn(*shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
    return noise


def _expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Scalar or [B] -> [1 or B, 1, ...], in float32 or the wider dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return coefficient.to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Shapes must be equal, got {shapes}.")
