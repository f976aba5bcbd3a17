"""The reward's gradient: closed forms, finite differences, stock pipelines that a strength of 0 does not change."""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

import alignkit
from alignkit.base import load_base
from alignkit.guidance import (
    Ascent,
    ascend,
    initial_latents,
    norm_log_density,
    starting_from,
    steer,
    steered,
    with_gradient,
)
from alignkit.noise import NoiseSchedule
from tests.tiny import SD_BETAS, save_tiny_model, tiny_sdxl
from tests.toy_rewards import Red

STEPS = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = load_base(save_tiny_model(tmp_path_factory.mktemp("tiny")), random_init=True).pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def red(images):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


# The regulariser


def test_norm_log_density():
    """The density of a norm r of d numbers of noise is r^(d - 1) exp(-r^2 / 2), up to a constant."""
    noise = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    d, norm = 36, noise.detach().flatten(1).norm(dim=1)
    density = norm ** (d - 1) * torch.exp(-norm.square() / 2)
    assert torch.allclose(norm_log_density(noise).exp(), density)
    (gradient,) = torch.autograd.grad(norm_log_density(noise).sum(), noise)
    assert torch.allclose(gradient, ((d - 1) / norm.square() - 1)[:, None, None, None] * noise)
    top = noise.detach() * (math.sqrt(d - 1) / norm)[:, None, None, None]
    for other in (0.9, 1.1):
        assert (norm_log_density(top) > norm_log_density(other * top)).all()


# The ascent


def test_ascent_is_clipped_nesterov():
    """On a linear reward a . x without regulariser: velocities and steps in closed form."""
    a = torch.tensor([[3.0, 4.0], [0.03, 0.04]])  # norms 5 and 0.05
    ascent = Ascent(steps=3, learning_rate=2.0, momentum=0.5, clip=0.1, regularization=0.0)
    x_T = torch.ones(2, 2)
    best, rewards = ascend(x_T, lambda noise: noise, lambda noise: (a * noise).sum(1), ascent)
    g = torch.tensor([[0.06, 0.08], [0.03, 0.04]])  # each sample's own clip
    velocity, expected, way = torch.zeros(2, 2), torch.ones(2, 2), []
    for _ in range(4):
        way.append((a * expected).sum(1))
        velocity = 0.5 * velocity + g
        last, expected = expected, expected + 2.0 * (g + 0.5 * velocity)
    assert torch.allclose(best, last) and torch.allclose(rewards, torch.stack(way))
    assert torch.equal(x_T, torch.ones(2, 2))


def test_the_best_of_the_way_is_kept_for_each_picture():
    """Steps that are far too long: the reward falls, so the start is the best."""
    x_T = torch.tensor([[1.0], [0.2]])
    ascent = Ascent(steps=1, learning_rate=100.0, momentum=0.0, clip=0.05, regularization=0.0)
    target = torch.tensor([[1.0], [5.0]])
    best, rewards = ascend(x_T, lambda noise: noise, lambda noise: -(noise - target).abs().sum(1), ascent)
    assert torch.allclose(best, torch.tensor([[1.0], [5.2]])) and rewards[1, 0] <= rewards[0, 0]


def test_a_gradient_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        ascend(torch.zeros(1, 2), lambda noise: noise, lambda noise: noise.sum(1).sqrt(), Ascent(steps=1))
    with pytest.raises(ValueError, match="above 0"):
        Ascent(learning_rate=0)


# Steps


SCHEDULES = {
    "epsilon": NoiseSchedule.from_scheduler(DDIMScheduler()),
    "v_prediction": NoiseSchedule.from_scheduler(DDIMScheduler(prediction_type="v_prediction")),
    "flow_prediction": NoiseSchedule("flow_prediction"),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_steering_moves_the_predicted_noise_against_the_gradient(kind):
    schedule, timestep = SCHEDULES[kind], 300 if kind != "flow_prediction" else torch.tensor(300.0)
    generator = torch.Generator().manual_seed(0)
    x_t, output, gradient = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    gradient[1] = 0
    moved = steer(output, gradient, schedule, timestep, 0.3)
    eps, new = (schedule.predict_noise(o, x_t, timestep) for o in (output, moved))
    sigma = float(schedule.sigma(timestep))
    expected = -0.3 * sigma * math.sqrt(36) * gradient[0] / gradient[0].norm()
    assert torch.allclose(new[0] - eps[0], expected) and torch.equal(new[1], eps[1])
    assert torch.equal(steer(output, gradient, schedule, timestep, 0.0), output)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_noise_without_any_signal_is_left_alone(scheduler):
    """Zero terminal SNR: at alpha = 0 (Euler: 2^-12), v would move by 1 / 0 (by 4,096) of what eps does."""
    settings = SD_BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_scheduler(scheduler(**settings))
    output, gradient = torch.randn(2, 1, 4, 3, 3).unbind()
    assert torch.equal(steer(output, gradient, schedule, 999, 0.3), output)
    assert not torch.allclose(steer(output, gradient, schedule, 990, 0.3), output)


# Stock pipelines


def test_with_gradient_draws_the_same(pipe):
    generator = torch.Generator().manual_seed(0)
    plain = pipe("a dog", generator=generator, **STEPS | {"output_type": "latent"}).images
    with with_gradient(pipe) as call:
        assert pipe.unet.is_gradient_checkpointing and pipe.vae.is_gradient_checkpointing
        traced = call("a dog", generator=generator.manual_seed(0), **STEPS | {"output_type": "latent"}).images
    assert torch.allclose(plain, traced, atol=1e-5)
    assert not pipe.unet.is_gradient_checkpointing and not pipe.vae.is_gradient_checkpointing


def test_the_gradient_of_the_whole_chain_against_finite_differences(pipe):
    pipe.unet.double(), pipe.vae.double(), pipe.text_encoder.double()
    options = STEPS | {"num_inference_steps": 2, "output_type": "latent"}
    x_T = initial_latents(pipe, "a dog", generator=torch.Generator().manual_seed(1), **options).requires_grad_()

    def reward(noise):
        with starting_from(pipe, lambda _: noise):
            return call("a dog", **options).images.square().sum()

    with with_gradient(pipe) as call:
        (gradient,) = torch.autograd.grad(reward(x_T), x_T)
        direction = torch.randn(x_T.shape, generator=torch.Generator().manual_seed(2), dtype=x_T.dtype)
        h = 1e-5
        numeric = (reward(x_T.detach() + h * direction) - reward(x_T.detach() - h * direction)) / (2 * h)
    pipe.unet.float(), pipe.vae.float(), pipe.text_encoder.float()
    assert torch.allclose((gradient * direction).sum(), numeric, rtol=1e-6)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("sdxl", [False, True])
def test_scale_0_is_the_stock_pipeline(scheduler, sdxl, pipe):
    """The machinery in place with nothing added; also of schedulers with another scale, and with two calls a step."""
    one = tiny_sdxl(pipe) if sdxl else pipe
    settings = STEPS | ({"height": 16, "width": 16} if sdxl else {})
    before = one.scheduler
    one.scheduler = scheduler.from_config(before.config)
    plain = one("a dog", generator=torch.Generator().manual_seed(0), **settings).images
    with with_gradient(one) as call, steered(one, red, 0.0):
        images = call("a dog", generator=torch.Generator().manual_seed(0), **settings).images
    assert torch.allclose(images, plain, atol=1e-5) and not images.requires_grad
    assert not {"step"} & {*vars(one.scheduler)} and "prepare_latents" not in vars(one)
    one.scheduler = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_means_the_same_for_every_reward(dtype, pipe):
    """Also in half precision, where the gradient of one that is 2^-20 of another would be 0."""
    own = copy.deepcopy(pipe.unet).to(dtype), copy.deepcopy(pipe.vae).to(dtype), copy.deepcopy(pipe.text_encoder)
    other = type(pipe)(**pipe.components | {"unet": own[0], "vae": own[1], "text_encoder": own[2].to(dtype)})
    other.set_progress_bar_config(disable=True)

    def drawn(factor):
        with with_gradient(other) as call, steered(other, lambda images: factor * red(images), 0.2):
            return call("a dog", generator=torch.Generator().manual_seed(0), **STEPS).images.float()

    with torch.no_grad():
        plain = other("a dog", generator=torch.Generator().manual_seed(0), **STEPS).images.float()
    assert torch.equal(drawn(1.0), drawn(2.0**-20)) and not torch.allclose(drawn(1.0), plain, atol=1e-2)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_one_step_against_its_formula(scheduler, pipe):
    """x_1 = step(eps - scale sigma sqrt(d) g / |g|), g taken by hand at x_T."""
    before, scale = pipe.scheduler, 0.2
    pipe.scheduler = scheduler.from_config(before.config)
    options = {"guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 1}
    x_T = initial_latents(pipe, "a dog", generator=torch.Generator().manual_seed(1), **options).requires_grad_()
    with with_gradient(pipe) as call, steered(pipe, red, scale):
        got = call("a dog", generator=torch.Generator().manual_seed(1), **options).images

    pipe.scheduler.set_timesteps(1)
    t, schedule = pipe.scheduler.timesteps[0], NoiseSchedule.from_scheduler(pipe.scheduler)
    x_t = pipe.scheduler.scale_model_input(x_T, t)
    eps = pipe.unet(x_t, t, pipe.encode_prompt("a dog", "cpu", 1, False)[0]).sample
    alpha, sigma = (c.float() for c in schedule.alpha_sigma(t.long()))
    images = pipe.vae.decode((x_t - sigma * eps) / alpha / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    (g,) = torch.autograd.grad(red(images).sum(), x_T)
    moved = eps - scale * sigma * math.sqrt(g.numel()) * g / g.norm()
    expected = pipe.scheduler.step(moved.detach(), t, x_T.detach()).prev_sample
    pipe.scheduler = before
    assert torch.allclose(got, expected, atol=1e-4)


def test_rewards_rise(pipe):
    composed, settings = alignkit.compose(pipe), STEPS | {"seed": 1, "reward": Red()}
    plain = composed(["a dog", "a hat"], **settings).rewards
    steered_ones = composed(["a dog", "a hat"], reward_scale=0.1, **settings).rewards
    ascended = composed(["a dog", "a hat"], ascent={"steps": 3}, **settings)
    assert (steered_ones > plain).all() and (ascended.rewards > plain).all()
    assert torch.equal(plain, composed(["a dog", "a hat"], ascent=0, reward_scale=0.0, **settings).rewards)


def test_the_first_ascent_of_a_scheduler_is_as_the_second(pipe):
    """Euler's noise has another deviation before its first call than at the timesteps of a call."""
    before = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(before.config)
    composed, settings = alignkit.compose(pipe), STEPS | {"seed": 1, "reward": Red(), "ascent": 2}
    first, second = (composed("a dog", **settings).images for _ in range(2))
    pipe.scheduler = before
    assert torch.equal(first, second)


def test_stopped_half_way_nothing_is_left(pipe):
    class Stop(Red):
        def score(self, images, prompts, **columns):
            raise KeyboardInterrupt

    parameters = list(pipe.unet.parameters())
    parameters[0].requires_grad_(True)
    for settings in ({"reward_scale": 0.1}, {"ascent": 1}):
        with pytest.raises(KeyboardInterrupt):
            alignkit.compose(pipe)("a dog", reward=Stop(), **STEPS | settings)
        assert "step" not in vars(pipe.scheduler) and "prepare_latents" not in vars(pipe)
        assert parameters[0].requires_grad and not parameters[1].requires_grad
        assert not pipe.unet.is_gradient_checkpointing and not pipe.vae.is_gradient_checkpointing
        assert torch.is_grad_enabled()
    parameters[0].requires_grad_(False)


def test_karras_timesteps_are_refused(pipe):
    before = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(before.config, use_karras_sigmas=True)
    with pytest.raises(ValueError, match="whole timesteps"):
        alignkit.compose(pipe)("a dog", reward=Red(), reward_scale=0.1, **STEPS)
    pipe.scheduler = before
