"""The schedule's closed forms, against each other in float64 and against diffusers' schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from alignkit.noise import PREDICTION_TYPES, NoiseSchedule, draw_noise
from tests.tiny import SD_BETAS, ddim


def schedule_of(prediction_type: str) -> NoiseSchedule:
    if prediction_type == "flow_prediction":
        return NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    return NoiseSchedule.from_scheduler(ddim(prediction_type=prediction_type))


def some_timesteps(schedule: NoiseSchedule) -> torch.Tensor:
    return schedule.timesteps(50)[[3, 20, 48]]


def latents(seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_gives_back_image_and_noise(prediction_type):
    """x_0, noise -> x_t and target -> x_0, noise: one timestep a sample."""
    schedule = schedule_of(prediction_type)
    x_0, noise, timestep = latents(0), latents(1), some_timesteps(schedule)
    x_t = schedule.add_noise(x_0, noise, timestep)
    target = schedule.target(x_0, noise, timestep)
    torch.testing.assert_close(schedule.predict_x_0(target, x_t, timestep), x_0, rtol=0, atol=1e-11)
    torch.testing.assert_close(schedule.predict_noise(target, x_t, timestep), noise, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x_0_comes_back_in_every_precision(prediction_type, dtype, tolerance):
    """From the least to the most noise, of SD's schedule; what x_t was rounded by is divided by alpha there."""
    schedule = schedule_of(prediction_type)
    timestep = torch.tensor([0, 50, 200, 600, 999])
    x_0, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = torch.get_rng_state()
    x_t, target = schedule.add_noise(x_0, noise, timestep), schedule.target(x_0, noise, timestep)
    predicted = schedule.predict_x_0(target.to(dtype), x_t.to(dtype), timestep)
    error = (predicted.double() - x_0.double()).flatten(1).abs().amax(1)
    assert (error * schedule.alpha(timestep).flatten() < tolerance).all(), error
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x_0_is_what_diffusers_step_predicts_without_its_clipping(prediction_type):
    """Also for a scheduler that clips, as ControlNet++'s code has it: the closed form does not."""
    scheduler = ddim(prediction_type=prediction_type)
    scheduler.set_timesteps(1000)
    schedule = schedule_of(prediction_type)
    clipping = NoiseSchedule.from_scheduler(ddim(prediction_type=prediction_type, clip_sample=True))
    output, x_t = 3 * latents(0), 3 * latents(1)
    for t in (0, 50, 200, 600, 999):
        expected = scheduler.step(output, t, x_t).pred_original_sample
        timestep = torch.full((3,), t)
        torch.testing.assert_close(schedule.predict_x_0(output, x_t, timestep), expected, rtol=1e-5, atol=1e-6)
        assert expected.abs().max() > 1  # what clip_sample would cut
        assert torch.equal(clipping.predict_x_0(output, x_t, timestep), schedule.predict_x_0(output, x_t, timestep))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_step_along_the_target_stays_on_the_straight_path(prediction_type):
    """With a perfect model and eta 0, x_prev = alpha_prev x_0 + sigma_prev noise; eta keeps the variance."""
    schedule = schedule_of(prediction_type)
    x_0, noise, fresh = latents(0), latents(1), latents(2)
    timestep, prev_timestep = some_timesteps(schedule)[:2]
    x_t = schedule.add_noise(x_0, noise, timestep)
    target = schedule.target(x_0, noise, timestep)
    x_prev = schedule.ddim_step(x_t, target, timestep, prev_timestep)
    torch.testing.assert_close(x_prev, schedule.add_noise(x_0, noise, prev_timestep), rtol=0, atol=1e-11)

    stochastic = schedule.ddim_step(x_t, target, timestep, prev_timestep, eta=1.0, noise=fresh)
    residual = stochastic - schedule.alpha(prev_timestep) * x_0  # = a noise + b fresh with a^2 + b^2 = sigma_prev^2
    basis = torch.stack([noise.flatten(), fresh.flatten()], dim=1)
    a, b = torch.linalg.lstsq(basis, residual.flatten()).solution
    assert b > 0
    torch.testing.assert_close(a**2 + b**2, schedule.sigma(prev_timestep) ** 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_step_is_diffusers_step(prediction_type, eta, set_alpha_to_one):
    scheduler = ddim(prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(20)
    timesteps = schedule.timesteps(20)
    x_t, output, noise = (latents(seed, torch.float32) for seed in range(3))
    for timestep, prev_timestep in zip(timesteps, [*timesteps[1:], None], strict=True):
        ours = schedule.ddim_step(x_t, output, timestep, prev_timestep, eta, noise)
        theirs = scheduler.step(output, timestep, x_t, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_log_prob_is_that_of_a_normal_distribution(prediction_type, eta):
    """Around the step without its noise, of the standard deviation that the noise has in it; a timestep a sample."""
    schedule = schedule_of(prediction_type)
    x_t, output, noise = (latents(seed) for seed in range(3))
    timestep, prev_timestep = some_timesteps(schedule), schedule.timesteps(50)[[4, 21, 49]]
    mean = schedule.ddim_step(x_t, output, timestep, prev_timestep, eta, torch.zeros_like(noise))
    x_prev = schedule.ddim_step(x_t, output, timestep, prev_timestep, eta, noise)
    std = schedule.ddim_std(timestep, prev_timestep, eta)
    torch.testing.assert_close(x_prev - mean, std.reshape(-1, 1, 1, 1) * noise, rtol=0, atol=1e-11)
    expected = torch.distributions.Normal(mean, std.reshape(-1, 1, 1, 1)).log_prob(x_prev).sum((1, 2, 3))
    log_prob = schedule.ddim_log_prob(x_prev, x_t, output, timestep, prev_timestep, eta)
    torch.testing.assert_close(log_prob, expected, rtol=1e-10, atol=0)


def test_ddpm_variance_is_that_of_diffusers():
    scheduler = ddim()
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(20)
    for timestep, prev_timestep in zip(schedule.timesteps(20), schedule.timesteps(20)[1:], strict=False):
        expected = scheduler._get_variance(timestep, prev_timestep).double()
        torch.testing.assert_close(schedule.ddim_std(timestep, prev_timestep, 1.0) ** 2, expected, rtol=1e-4, atol=0)


def test_a_step_without_noise_has_no_density():
    x_t = latents(0)
    schedule = NoiseSchedule.from_scheduler(ddim(set_alpha_to_one=True))
    for timestep, prev_timestep, eta in [(981, 961, 0.0), (1, None, 1.0)]:
        assert schedule.ddim_std(timestep, prev_timestep, eta) == 0
        with pytest.raises(ValueError, match="has no noise"):
            schedule.ddim_log_prob(x_t, x_t, x_t, timestep, prev_timestep, eta)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_step_is_diffusers_euler_step(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(10)
    timesteps = schedule.timesteps(10)
    torch.testing.assert_close(timesteps, scheduler.timesteps)
    x_t, output = latents(0, torch.float32), latents(1, torch.float32)
    for timestep, prev_timestep in zip(timesteps, [*timesteps[1:], None], strict=True):
        ours = schedule.ddim_step(x_t, output, timestep, prev_timestep)
        theirs = scheduler.step(output, timestep, x_t).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x_t = theirs


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing):
    scheduler = ddim(timestep_spacing=spacing)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for n in [*range(1, 61), 100, 999]:
        scheduler.set_timesteps(n)
        timesteps = schedule.timesteps(n)
        assert timesteps.dtype == torch.int64
        assert timesteps.tolist() == scheduler.timesteps.tolist()


def test_timesteps_out_of_range_are_refused():
    schedule = schedule_of("epsilon")
    for n in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            schedule.timesteps(n)
    with pytest.raises(ValueError, match="run past"):
        schedule.timesteps(1000)  # steps_offset 1 would ask for timestep 1000 of 0 .. 999


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_any_discrete_scheduler_gives_the_same_noise(scheduler):
    ours, theirs = NoiseSchedule.from_scheduler(scheduler(**SD_BETAS)), scheduler(**SD_BETAS)
    torch.testing.assert_close(ours.alpha(torch.arange(1000)) ** 2, theirs.alphas_cumprod.double())
    if scheduler is not EulerDiscreteScheduler:  # it scales x_t by 1 / alpha_t
        x_0, noise, timestep = latents(0, torch.float32), latents(1, torch.float32), torch.tensor([7, 400, 999])
        torch.testing.assert_close(ours.add_noise(x_0, noise, timestep), theirs.add_noise(x_0, noise, timestep))


def test_pndm_of_stable_diffusion_ends_at_the_first_alpha():
    """SD 1.x ships PNDM, set_alpha_to_one false: after the last step abar is abar_0 = 1 - beta_0 = 0.99915."""
    schedule = NoiseSchedule.from_scheduler(PNDMScheduler(**SD_BETAS, steps_offset=1))
    alpha, sigma = schedule.alpha_sigma(None)
    assert alpha.item() ** 2 == pytest.approx(0.99915, abs=1e-7)
    assert alpha.item() ** 2 + sigma.item() ** 2 == pytest.approx(1)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_snr(prediction_type):
    schedule = schedule_of(prediction_type)
    timestep = some_timesteps(schedule)
    alpha, sigma = schedule.alpha_sigma(timestep)
    torch.testing.assert_close(schedule.snr(timestep), alpha**2 / sigma**2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_makes_a_loss_in_x_0_of_a_loss_in_the_output(prediction_type):
    """Weight times squared error of the output = min(SNR, gamma) times that of the x_0 it implies."""
    schedule = schedule_of(prediction_type)
    x_0, noise, output, timestep = latents(0), latents(1), latents(2), some_timesteps(schedule)
    x_t = schedule.add_noise(x_0, noise, timestep)
    in_output = (output - schedule.target(x_0, noise, timestep)).square().mean((1, 2, 3))
    in_x_0 = (schedule.predict_x_0(output, x_t, timestep) - x_0).square().mean((1, 2, 3))
    expected = schedule.snr(timestep).clamp(max=5.0) * in_x_0
    torch.testing.assert_close(schedule.min_snr_weight(timestep, 5.0) * in_output, expected, rtol=1e-9, atol=0)


def test_min_snr_is_that_of_the_papers_formulas():
    for prediction_type, more in (("epsilon", 0), ("v_prediction", 1)):
        schedule = schedule_of(prediction_type)
        snr = compute_snr(ddim(), torch.arange(1000)).double()
        expected = snr.clamp(max=5.0) / (snr + more)
        torch.testing.assert_close(schedule.min_snr_weight(torch.arange(1000), 5.0), expected, rtol=1e-3, atol=0)


def test_offset_noise_moves_whole_channels():
    def drawn(offset):
        return draw_noise((4, 16, 16), torch.Generator().manual_seed(0), offset)

    assert torch.equal(drawn(0.0), torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)))
    moved = (drawn(0.1) - drawn(0.0)) / 0.1
    assert moved[:, 0, 0].std() > 0.1
    torch.testing.assert_close(moved, moved[:, :1, :1].expand_as(moved), rtol=0, atol=1e-5)


def test_one_snr_means_the_same_noise_in_another_family():
    epsilon, flow = schedule_of("epsilon"), schedule_of("flow_prediction")
    assert float(epsilon.snr(200)) == pytest.approx(3.06, abs=0.005)
    assert float(flow.snr(364)) == pytest.approx(3.06, abs=0.02)  # what the docs say of the reward's threshold


def test_half_precision_latents_are_computed_in_float32():
    schedule = schedule_of("epsilon")
    x_0, noise = latents(0, torch.bfloat16), latents(1, torch.bfloat16)
    x_t = schedule.add_noise(x_0, noise, 1)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, schedule.add_noise(x_0.float(), noise.float(), 1))


def test_gradients_of_a_step_are_its_coefficients():
    """d x_prev / d output = sigma_prev - sigma_t alpha_prev / alpha_t for epsilon at eta 0."""
    schedule = schedule_of("epsilon")
    x_t, output = latents(0), latents(1).requires_grad_()
    schedule.ddim_step(x_t, output, 981, 961).sum().backward()
    gain = schedule.sigma(961) - schedule.sigma(981) * schedule.alpha(961) / schedule.alpha(981)
    torch.testing.assert_close(output.grad, gain.expand_as(x_t))


def test_what_is_refused():
    schedule = schedule_of("epsilon")
    x_t = latents(0)
    with pytest.raises(TypeError, match="integers, got torch.bfloat16"):
        schedule.alpha(torch.tensor(981, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"model_output \[3, 8, 8, 8\], x_t \[3, 4, 8, 8\]"):
        schedule.predict_x_0(torch.cat([x_t, x_t], dim=1), x_t, 1)  # a model that also predicts a variance
    with pytest.raises(ValueError, match="needs noise"):
        schedule.ddim_step(x_t, x_t, 981, 961, eta=1.0)
    with pytest.raises(ValueError, match="sample"):
        NoiseSchedule.from_scheduler(ddim(prediction_type="sample"))
    with pytest.raises(ValueError, match="thresholding"):
        NoiseSchedule.from_scheduler(ddim(thresholding=True))
    with pytest.raises(ValueError, match="shift_terminal"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift_terminal=0.02))
