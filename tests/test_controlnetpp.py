"""training/controlnetpp.py and alignkit/controlnet.py on randomly initialised models of a few thousand parameters."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file

from alignkit.artifacts import read_events
from alignkit.base import load_base
from alignkit.conditions import ConditionConfig, build_condition
from alignkit.config import parse
from alignkit.controlnet import WEIGHTS, draw_controlled, load_controlnet, new_controlnet, predict, save_controlnet
from alignkit.early_stop import EarlyStopConfig
from alignkit.noise import NoiseSchedule
from alignkit.rewards import RewardConfig
from alignkit.run import Run
from tests.runs import assert_same, reproducible, scalars
from tests.test_controlnet_families import BLOCKS, PIPELINES
from tests.test_controls import write_folder, write_metadata
from tests.test_families import thin
from tests.tiny import save_tiny_model
from tests.torchrun import train_on_two_ranks
from tests.toy_conditions import save_estimator, save_segmenter
from training import controlnetpp
from training.controlnetpp import Config, controlnet_losses, train

ROOT = Path(__file__).parent.parent
RED = "tests.toy_conditions:Red"
ALL = [0, 999]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder, number=6, size=(16, 20))
    return str(folder)


@pytest.fixture
def config(tiny_model, data, tmp_path):
    """Makes a Config of 4 updates of 4 images."""

    def make(name: str = "run", **fields) -> Config:
        defaults = {
            "pretrained_model_name_or_path": tiny_model,
            "random_init": True,
            "condition": ConditionConfig(RED),
            "train_data_dir": data,
            "reward_weight": 0.5,
            "reward_timesteps": [0, 500],
            "max_train_steps": 4,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "checkpointing_steps": 4,
            "validation_steps": 0,
            "num_validation_images": 3,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "report_to": "none",
        }
        return Config(output_dir=str(tmp_path / name), **{**defaults, **fields})

    return make


@pytest.fixture(scope="module")
def base(tiny_model):
    return load_base(tiny_model, random_init=True)


def perturbed(controlnet: ControlNetModel) -> ControlNetModel:
    """As after some training: without zeros."""
    generator = torch.Generator().manual_seed(7)
    for parameter in controlnet.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return controlnet


def weights_of(folder: Path) -> dict:
    return load_file(folder / WEIGHTS)


# x_0 and the mask


def schedules() -> list[NoiseSchedule]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    return [
        NoiseSchedule("epsilon", alphas_cumprod=abar),
        NoiseSchedule("v_prediction", alphas_cumprod=abar),
        NoiseSchedule("flow_prediction"),
    ]


@pytest.mark.parametrize("schedule", schedules(), ids=lambda schedule: schedule.prediction_type)
def test_what_an_error_of_the_network_does_to_x_0(schedule):
    """By the factor of trap 3 in one step, whatever the prediction is: sigma/alpha, sigma, sigma."""
    x_0, noise, error = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timestep = torch.tensor([200, 200])
    x_t = schedule.add_noise(x_0, noise, timestep)
    predicted = schedule.predict_x_0(schedule.target(x_0, noise, timestep) + error, x_t, timestep)
    factor = {"epsilon": 0.5717, "v_prediction": 0.4963, "flow_prediction": 0.2}[schedule.prediction_type]
    torch.testing.assert_close(x_0 - predicted, factor * error, rtol=2e-4, atol=1e-9)


class Spy:
    """A perfect denoiser up to a learnt error, a decoder, and a consistency loss that count what they are shown."""

    def __init__(self, schedule, x_0, noise, poison=None):
        self.schedule, self.x_0, self.noise, self.poison = schedule, x_0, noise, poison
        self.error = torch.full(x_0.shape[1:], 0.1, requires_grad=True)
        self.decoded, self.rows = [], []

    def predict(self, x_t, timestep):
        output = self.schedule.target(self.x_0, self.noise, timestep) + self.error
        if self.poison is not None:  # finite, but out of all proportion for this sample
            output = output * torch.where(torch.arange(len(output)) == self.poison, 1e20, 1.0)[:, None, None, None]
        return output

    def decode(self, latents):
        self.decoded.append(len(latents))
        return (latents.square() * latents).sigmoid()

    def consistency(self, images, rows):
        self.rows += rows.tolist()
        return images.square().flatten(1).mean(1)

    def losses(self, timestep, rewarded, snr_gamma=None):
        seen = self.schedule, self.x_0, self.noise
        return controlnet_losses(self.predict, *seen, timestep, rewarded, self.decode, self.consistency, snr_gamma)


@pytest.fixture
def spy():
    x_0, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return lambda **fields: Spy(schedules()[0], x_0, noise, **fields)


TIMESTEP = torch.tensor([100, 900, 150, 800])
REWARDED = torch.tensor([True, False, True, False])


def test_only_rewarded_samples_are_decoded(spy):
    one = spy()
    losses = one.losses(TIMESTEP, REWARDED)
    assert one.decoded == [2] and one.rows == [0, 2]
    assert (losses.reward > 0).tolist() == REWARDED.tolist()
    none = spy()
    losses = none.losses(TIMESTEP, torch.zeros(4, dtype=torch.bool))
    assert none.decoded == [] and torch.equal(losses.reward, torch.zeros(4)) and not losses.reward.requires_grad


def test_min_snr_weighs_the_diffusion_loss_alone(spy):
    plain, weighted = spy().losses(TIMESTEP, REWARDED), spy().losses(TIMESTEP, REWARDED, snr_gamma=5.0)
    weight = schedules()[0].min_snr_weight(TIMESTEP, 5.0).float()
    torch.testing.assert_close(weighted.diffusion, weight * plain.diffusion)
    assert torch.equal(weighted.reward, plain.reward) and weight.min() < 1


def test_choosing_before_decoding_equals_masking_after_it(spy):
    chosen, masked = spy(), spy()
    chosen.losses(TIMESTEP, REWARDED).reward.sum().backward()
    (masked.losses(TIMESTEP, torch.ones(4, dtype=torch.bool)).reward * REWARDED).sum().backward()
    torch.testing.assert_close(chosen.error.grad, masked.error.grad, rtol=1e-6, atol=1e-9)


def test_a_bad_sample_that_is_not_rewarded_does_no_harm(spy):
    poisoned = spy(poison=1)
    losses = poisoned.losses(TIMESTEP, REWARDED)
    losses.reward.sum().backward()
    assert losses.reward.isfinite().all() and poisoned.error.grad.isfinite().all()


def test_the_rewards_gradient_by_finite_differences(tiny_model):
    """From the consistency through decoder, x_0 and the frozen U-Net to the ControlNet's weights, in float64.

    The decoder's clamp, whose gradient is not its derivative, is a sigmoid here.
    """
    base = load_base(tiny_model, random_init=True, dtype=torch.float64)
    controlnet = perturbed(new_controlnet(base.unet, base.vae_scale_factor)).double().eval()
    condition = build_condition("softedge").double()
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    control, images = torch.rand(2, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    targets = condition.extract(images)
    text = base.condition(["a cat", "a dog"], 16, 16)["encoder_hidden_states"]

    def denoise(x_t, timestep):
        down, mid = controlnet(x_t, timestep, text, control, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return base.unet(x_t, timestep, text, **added).sample

    def loss() -> torch.Tensor:
        losses = controlnet_losses(
            denoise,
            base.schedule,
            x_0,
            noise,
            torch.tensor([100, 150]),
            torch.tensor([True, True]),
            lambda latents: base.vae.decode(latents).sample.sigmoid(),
            lambda images, rows: condition(images, targets[rows]),
        )
        return losses.reward.sum()

    parameters = list(controlnet.parameters())
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters)
    along = sum(float((gradient * d).sum()) for gradient, d in zip(gradients, directions, strict=True))

    @torch.no_grad()
    def moved(step: float) -> float:
        torch._foreach_add_(parameters, directions, alpha=step)
        value = float(loss())
        torch._foreach_add_(parameters, directions, alpha=-step)
        return value

    step = 1e-6
    assert along == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-5)


def test_which_timesteps_are_rewarded(config):
    """Both ends are included, and a signal-to-noise ratio means the same."""
    cfg, run, schedule = config(reward_timesteps=[50, 200]), Run(config()), schedules()[0]

    def rewarded(timestep, span):
        return span[0] <= float(schedule.snr(timestep)) <= span[1]

    span = controlnetpp.snr_range(cfg, schedule)
    assert [rewarded(t, span) for t in (49, 50, 125, 200, 201)] == [False, True, True, True, False]
    by_snr = controlnetpp.snr_range(config(reward_min_snr=float(schedule.snr(200))), schedule)
    assert [rewarded(t, by_snr) for t in (0, 200, 201)] == [True, True, False]
    flow = schedules()[2]
    assert [by_snr[0] <= float(flow.snr(torch.tensor(t))) for t in (363.0, 364.5)] == [True, False]  # sigma 0.364

    span = controlnetpp.snr_range(config(reward_timesteps=[0, 200]), schedule)
    draws = [controlnetpp.draw(cfg, run, schedule, span, i // 100, i) for i in range(4000)]
    share = sum(d.rewarded for d in draws) / len(draws)
    assert abs(share - 0.201) < 4 * math.sqrt(0.201 * 0.799 / 4000)


def test_timesteps_of_a_flow_model_are_shifted_towards_noise():
    """sigma / (1 - sigma) by the factor; how much of a logit-normal law that leaves below SD's t = 200, by its CDF."""
    flow, seeds = schedules()[2], range(2000)
    plain, shifted = (
        torch.stack([controlnetpp.draw_timestep(flow, torch.Generator().manual_seed(i), shift) for i in seeds])
        for shift in (1.0, 3.0)
    )
    odds = [flow.sigma(t) / flow.alpha(t) for t in (plain, shifted)]
    torch.testing.assert_close(odds[1], 3 * odds[0], rtol=1e-3, atol=0)
    for drawn, shift in ((plain, 1.0), (shifted, 3.0)):
        expected = float(torch.special.ndtr(torch.tensor(-math.log(shift) - math.log(3.06) / 2)))
        share = float((flow.snr(drawn) >= 3.06).float().mean())
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(drawn))


def test_flux_is_told_its_guidance_in_training(tmp_path):
    base = load_base(thin("flux", tmp_path), random_init=True, shrink=40)
    told = controlnetpp.encode_prompt(base, ["a cat", "a dog"], (32, 32), 3.5)
    assert told["guidance"].tolist() == [3.5, 3.5]
    remembered = controlnetpp.remembering(partial(controlnetpp.encode_prompt, base, guidance_scale=3.5), base.device)
    for name, tensor in remembered(["a cat", "a dog"], (32, 32)).items():
        torch.testing.assert_close(tensor, told[name])


def test_a_dropped_condition_is_black_and_has_no_reward(config, base):
    cfg, run = config(condition_dropout=0.5, prompt_dropout=0.5), Run(config())
    span = controlnetpp.snr_range(config(reward_timesteps=ALL), base.schedule)
    draws = [controlnetpp.draw(cfg, run, base.schedule, span, 0, i) for i in range(400)]
    assert all(d.rewarded != d.drop_condition for d in draws)
    kinds = {(d.drop_prompt, d.drop_condition) for d in draws}
    assert len(kinds) == 4 and 150 < sum(d.drop_condition for d in draws) < 250

    seen = {}

    class Net:
        def __call__(self, x_t, timestep, prompt_embeds, control, *args, **kwargs):
            seen.update(control=control, prompt_embeds=prompt_embeds)
            raise StopIteration

    chance = [next(d for d in draws if (d.drop_prompt, d.drop_condition) == k) for k in [(False, True), (True, False)]]
    batch = controlnetpp.Batch(torch.zeros(2, 4, 8, 8), torch.ones(2, 16, 16), ["a cat", "a cat"])
    encode_prompts = partial(controlnetpp.encode_prompt, base)
    predict = controlnetpp.controlled(base, Net(), build_condition(RED), batch, chance, encode_prompts)
    with pytest.raises(StopIteration):
        predict(batch.x_0, torch.tensor([1, 1]))
    assert seen["control"][0].max() == 0 and seen["control"][1].min() == 1
    assert torch.equal(seen["prompt_embeds"], base.encode_prompt(["a cat", ""]))


# The ControlNet


def test_a_new_controlnet_changes_nothing_and_learns_by_its_zero_convolutions_first(base):
    controlnet = new_controlnet(base.unet, base.vae_scale_factor)
    x_t, control = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16)
    condition = base.condition(["a cat", "a dog"])
    output = predict(base, controlnet, x_t, torch.tensor([5, 700]), control, condition)
    plain = base.unet(x_t, torch.tensor([5, 700]), **condition).sample
    assert torch.equal(output, plain)
    output.square().sum().backward()
    touched = {name for name, p in controlnet.named_parameters() if p.grad is not None and p.grad.any()}
    zeros = {
        name for name, p in controlnet.named_parameters() if name.startswith(("controlnet_down", "controlnet_mid"))
    }
    assert touched == zeros
    perturbed(controlnet).zero_grad()
    output = predict(base, controlnet, x_t, torch.tensor([5, 700]), control, condition)
    output.square().sum().backward()
    assert all(p.grad.any() for p in controlnet.parameters())
    assert all(p.grad is None for module in (base.unet, base.vae, base.text_encoder) for p in module.parameters())


def test_its_weights_are_of_the_seed_alone(base):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (new_controlnet(base.unet, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    name = "controlnet_cond_embedding.conv_in.weight"
    assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_stock_diffusers_loads_it_and_draws_the_same_pixels(base, tmp_path):
    controlnet = perturbed(new_controlnet(base.unet, base.vae_scale_factor))
    save_controlnet(tmp_path, controlnet)
    loaded = load_controlnet(str(tmp_path), base.unet, base.vae_scale_factor)
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    controls, prompts = torch.rand(2, 3, 16, 16), ["a cat", "a dog"]
    ours = draw_controlled(
        base, loaded, controls, prompts, [3, 4], num_inference_steps=4, guidance_scale=5.0, negative_prompt="bad"
    )
    pipe = StableDiffusionControlNetPipeline(
        **base.pipeline().components, controlnet=ControlNetModel.from_pretrained(tmp_path)
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompts, controls, num_inference_steps=4, guidance_scale=5.0, negative_prompt=["bad"] * 2, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours[0] - ours[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_both_stages_and_the_stock_pipelines_pixels(config, tmp_path, monkeypatch, name):
    """One update without and one with a reward, a dropped prompt among them; then stock diffusers draws the same."""
    folder = thin(name, tmp_path / name, **BLOCKS.get(name, {}))
    fields = {"pretrained_model_name_or_path": folder, "shrink": 40, "resolution": 32, "prompt_dropout": 0.5}
    fields["offload_text_encoders"] = name != "sdxl"
    out = train(config("run", **fields, max_train_steps=2, reward_start=1, reward_timesteps=ALL, learning_rate=0.1))
    first, second = scalars(out)
    assert "reward_loss" not in first and second["reward_loss"] > 0
    stock = PIPELINES[name]
    assert stock.__name__ in (out / "README.md").read_text()

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    base = load_base(folder, random_init=True, shrink=40)
    controlnet, controls = load_controlnet(str(out), base.network, base.vae_scale_factor), torch.rand(1, 3, 32, 32)
    settings = {"num_inference_steps": 2, "guidance_scale": 5.0}
    ours, plain = (
        draw_controlled(base, controlnet, controls, ["a cat"], [3], **settings, conditioning_scale=scale)
        for scale in (1.0, 0.0)
    )
    parts = base.pipeline().components | {"controlnet": type(controlnet).from_pretrained(out).eval()}
    pipe = stock(**parts, **({"add_watermarker": False} if name == "sdxl" else {}))
    pipe.set_progress_bar_config(disable=True)
    shown = {"image": controls} if name == "sdxl" else {"control_image": 2 * controls - 1}
    theirs = pipe("a cat", **shown, generator=torch.Generator().manual_seed(3), output_type="pt", **settings)
    torch.testing.assert_close(ours, theirs.images, rtol=0, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-3


def test_a_controlnet_that_does_not_fit_is_refused(base, tmp_path):
    controlnet = new_controlnet(base.unet, base.vae_scale_factor)
    save_controlnet(tmp_path / "fits", controlnet)
    save_controlnet(tmp_path / "wide", new_controlnet(load_base("emoji", random_init=True, shrink=4).unet, 4))
    with pytest.raises(ValueError, match="does not fit this base.*VAE factor of 4, the base's is 2"):
        load_controlnet(str(tmp_path / "wide"), base.unet, 2)
    with pytest.raises(ValueError, match="of another base: its block_out_channels"):
        load_controlnet(str(tmp_path / "wide"), base.unet, 4)
    with pytest.raises(FileNotFoundError, match="No ControlNet 'nowhere'"):
        load_controlnet("nowhere", base.unet, 2)
    (tmp_path / "fits" / WEIGHTS).rename(tmp_path / "fits" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="--target .*diffusion_pytorch_model.safetensors"):
        load_controlnet(str(tmp_path / "fits"), base.unet, 2)
    (tmp_path / "fits" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="expected diffusion_pytorch_model.safetensors"):
        load_controlnet(str(tmp_path / "fits"), base.unet, 2)
    controlnet.conv_in.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite: conv_in.bias"):
        save_controlnet(tmp_path / "bad", controlnet)
    assert not (tmp_path / "bad" / "config.json").exists()


# A run


def test_from_config_to_card(config, capsys):
    cfg = config(validation_steps=2, monitors=[RewardConfig("tests.toy_rewards:Red")], use_ema=True)
    folder = train(cfg)
    said = capsys.readouterr().out
    for name in (WEIGHTS, "config.json", "strip.png", "curves.png", "README.md"):
        assert (folder / name).is_file()
    assert str(folder / "strip.png") in said
    with Image.open(folder / "strip.png") as strip:
        assert strip.size == (3 * 128, 4 * 128)
    events = scalars(folder)
    assert [event["step"] for event in events] == [0, 1, 2, 3]
    assert {"loss", "diffusion", "reward_loss", "rewarded_share", "clamped_share", "grad_norm"} <= events[0].keys()
    assert {"validation/RMSE", "validation/diffusion", "monitor/Red"} <= events[1].keys()
    assert events[0]["loss"] == pytest.approx(events[0]["diffusion"] + 0.5 * events[0]["reward_loss"])
    pipe_ready = ControlNetModel.from_pretrained(folder)
    assert {p.dtype for p in pipe_ready.parameters()} == {torch.float32}


def test_frozen_is_frozen(config, tiny_model, tmp_path, monkeypatch):
    """Base and judge are byte-equal after training, the judge's running statistics included."""
    seen = {}
    for module, real in (("alignkit.run", load_base), ("training.controlnetpp", build_condition)):
        name = real.__name__
        monkeypatch.setattr(f"{module}.{name}", lambda *a, n=name, r=real, **k: seen.setdefault(n, r(*a, **k)))
    model = save_segmenter(tmp_path / "segmenter")
    cfg = config(condition=ConditionConfig("segmentation", {"model": model}), reward_timesteps=ALL)
    train(cfg)
    fresh = load_base(tiny_model, random_init=True)
    pairs = [(getattr(seen["load_base"], m), getattr(fresh, m)) for m in ("unet", "vae", "text_encoder")]
    pairs.append((seen["build_condition"], build_condition("segmentation", model=model)))
    for trained, expected in pairs:
        assert all(parameter.grad is None for parameter in trained.parameters())
        there = expected.state_dict()
        assert all(torch.equal(tensor, there[name]) for name, tensor in trained.state_dict().items())


def test_without_a_reward_it_is_ordinary_controlnet_training(config, monkeypatch):
    """lambda 0, a range that nothing hits and a detached reward: bit for bit the same."""
    plain = train(config("plain", reward_weight=0.0))
    assert "reward_loss" not in scalars(plain)[0]
    assert_same(plain, train(config("never", reward_min_snr=1000.0)))  # t = 0 alone
    monkeypatch.setattr(controlnetpp, "probe_condition", lambda *args: None)
    assert_same(plain, train(config("detached", condition=ConditionConfig("tests.toy_conditions:Rounded"))))
    rewarded = weights_of(train(config("rewarded")))
    assert any(not torch.equal(tensor, rewarded[name]) for name, tensor in weights_of(plain).items())


def test_a_noise_offset_shifts_whole_channels(config, monkeypatch):
    """Of the noise that the loss is of: by another number in each channel and sample."""
    losses, seen = controlnetpp.controlnet_losses, []

    def spy(predict, schedule, x_0, noise, *rest):
        seen.append(noise)
        return losses(predict, schedule, x_0, noise, *rest)

    monkeypatch.setattr(controlnetpp, "controlnet_losses", spy)
    for name, offset in (("plain", 0.0), ("shifted", 0.5)):
        train(config(name, noise_offset=offset, max_train_steps=1, gradient_accumulation_steps=1, validation_steps=0))
    shift = seen[1] - seen[0]
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-5)
    assert shift[..., 0, 0].abs().min() > 0 and shift[..., 0, 0].unique().numel() == shift[..., 0, 0].numel()


def test_the_reward_starts_where_it_should(config):
    events = scalars(train(config(reward_start=2)))
    assert ["reward_loss" in event for event in events] == [False, False, True, True]


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_accumulation_changes_nothing(config, batch, accumulation):
    """The number of rewarded samples differs from micro-batch to micro-batch; what counts is the global batch's."""
    fields = {"max_train_steps": 2, "reward_timesteps": [0, 400], "reward_weight": 5.0, "condition_dropout": 0.2}
    fields |= {"crop": "random", "prompt_dropout": 0.2}
    one = train(config("one", **fields))
    two = train(config("two", train_batch_size=batch, gradient_accumulation_steps=accumulation, **fields))
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        for name in ("loss", "diffusion", "reward_loss", "rewarded_share", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    # AdamW's first steps are of the sign of a gradient, so a rounding error in one near 0 shows in full
    for name, tensor in weights_of(one).items():
        assert ((tensor - weights_of(two)[name]).abs() > 1e-5).float().mean() < 0.02, name


@pytest.mark.parametrize("case", ["plain", "cached", "sd3"])
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, case):
    fields = {"checkpointing_steps": 2, "validation_steps": 2, "use_ema": True, "lr_scheduler": "cosine"}
    fields |= {"reward_start": 1, "prompt_dropout": 0.3, "cache": case != "plain"}
    if case == "sd3":
        folder = thin("sd3", tmp_path / "sd3", **BLOCKS["sd3"])
        fields |= {"pretrained_model_name_or_path": folder, "shrink": 40, "resolution": 32, "condition_dropout": 0.3}
    whole = train(config("whole", **fields))
    resumed = train(config("resumed", **fields))
    for leftover in (resumed / "checkpoint-4").iterdir():
        leftover.unlink()
    (resumed / "checkpoint-4").rmdir()
    (resumed / WEIGHTS).unlink()
    train(config("resumed", **fields))
    assert_same(whole, resumed)  # the EMA's weights
    assert reproducible(whole) == reproducible(resumed) and len(scalars(whole)) == 4


def test_the_next_images_are_read_while_these_are_learnt(config, monkeypatch):
    """Each micro-batch once, the next one before the current one is learnt from, and nothing behind the last."""
    told, read, learn = [], controlnetpp.Loader.read, controlnetpp.controlled

    def reading(loader, step, indices):
        told.append(("read", step, indices[0]))
        return read(loader, step, indices)

    monkeypatch.setattr(controlnetpp.Loader, "read", reading)
    monkeypatch.setattr(controlnetpp, "controlled", lambda *args: told.append("learn") or learn(*args))
    train(config(max_train_steps=2))
    expected = [("read", 0, 0)]
    for step, first in ((0, 2), (1, 4), (1, 6)):
        expected += [("read", step, first), "learn"]
    assert told == [*expected, "learn"]


def test_cached_or_not_is_the_same(config):
    one, two = train(config("one")), train(config("two", cache=True))
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_checkpointing_changes_no_gradient(config):
    fields = {"max_train_steps": 2, "reward_timesteps": ALL}
    one, two = train(config("one", **fields)), train(config("two", gradient_checkpointing=True, **fields))
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    moments, others = (load_file(folder / "checkpoint-2" / "optimizer.safetensors") for folder in (one, two))
    means = {name: moment for name, moment in moments.items() if name.endswith("/exp_avg")}  # of both gradients
    largest = max(float(mean.abs().max()) for mean in means.values())
    for name, mean in means.items():
        torch.testing.assert_close(others[name], mean, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_checkpointing_the_decoder_saves_memory(tiny_model):
    """Bytes that a decode keeps for its backward pass."""

    def saved(base) -> int:
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            base.decode(torch.randn(2, 4, 8, 8, requires_grad=True))
        return total

    plain = load_base(tiny_model, random_init=True)
    checkpointed = load_base(tiny_model, random_init=True)
    checkpointed.vae.enable_gradient_checkpointing()
    assert saved(checkpointed) < saved(plain) / 4


def test_two_processes_equal_one(config, tmp_path):
    fields = {"max_train_steps": 3, "validation_steps": 3, "reward_timesteps": [0, 400]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: more would round differently
    one = train(config("one", **fields))
    torch.set_num_threads(threads)
    two = train_on_two_ranks("training/controlnetpp.py", config("two", **fields, gradient_accumulation_steps=1))
    assert_same(one, two, tolerance=1e-5)
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        for name in ("loss", "diffusion", "reward_loss", "rewarded_share", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_images_of_several_shapes_however_a_batch_is_cut(config, tmp_path, monkeypatch):
    """Each batch has one size, at which the condition was probed first; a batch of 4 is the same as two of 2."""
    rows = []
    for shape in ((16, 16), (12, 24)):
        name = f"{shape[0]}x{shape[1]}"
        for row in write_folder(tmp_path / "data" / name, number=3, size=shape):
            rows.append({key: value if key == "text" else f"{name}/{value}" for key, value in row.items()})
    write_metadata(tmp_path / "data", rows)
    seen, probed = [], []

    def spy(predict, schedule, x_0, *args):
        seen.append(tuple(x_0.shape))
        return controlnet_losses(predict, schedule, x_0, *args)

    monkeypatch.setattr(controlnetpp, "controlnet_losses", spy)
    monkeypatch.setattr(controlnetpp, "probe_condition", lambda condition, *size: probed.append(size[:2]))
    fields = {"train_data_dir": str(tmp_path / "data"), "bucket_batch_size": 4, "max_train_steps": 3}
    one = train(config("one", **fields, train_batch_size=4, gradient_accumulation_steps=1))
    assert set(seen) == {(4, 4, 8, 8), (4, 4, 6, 10)} and probed == [(12, 20), (16, 16)]
    two = train(config("two", **fields))
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        for name in ("loss", "diffusion", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["segmentation", "depth", "softedge", "lineart", "canny"])
def test_every_condition_trains(config, tmp_path, kind):
    """On scenes of the emoji world, made smaller, with a global batch that leaves some steps without a reward."""
    args = {}
    if kind == "segmentation":
        args = {"model": save_segmenter(tmp_path / "judge", num_labels=400)}
    if kind == "depth":
        args = {"model": save_estimator(tmp_path / "judge")}
    cfg = config(
        condition=ConditionConfig(kind, args), train_data_dir="emoji", max_train_steps=2, reward_timesteps=[0, 300],
        train_batch_size=1, gradient_accumulation_steps=3, resolution=32, num_validation_images=2,
        pretrained_model_name_or_path="emoji", shrink=8,
    )  # fmt: skip
    assert all(math.isfinite(event["loss"]) for event in scalars(train(cfg)))


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward_timesteps": [200, 0]}, r"expected \[first, last\]"),
        ({"reward_timesteps": [3]}, r"expected \[first, last\]"),
        ({"reward_weight": -1.0}, "reward_weight: expected at least 0"),
        ({"reward_weight": math.nan}, "reward_weight: expected at least 0"),
        ({"bucket_batch_size": 3}, "bucket_batch_size: expected a multiple of train_batch_size .2., .* got 3"),
        ({"bucket_batch_size": 4, "train_data_dir": "emoji"}, "bucket_batch_size: expected 0 for the emoji world"),
        ({"reward_min_snr": 0.0}, "reward_min_snr: expected above 0"),
        ({"timestep_shift": 0.0}, "timestep_shift: expected above 0, got 0"),
        ({"train_guidance_scale": -1.0}, "train_guidance_scale: expected above 0, got -1"),
        ({"prompt_dropout": 1.0}, "prompt_dropout: expected at least 0 and below 1"),
        ({"cache": True, "crop": "random"}, "cache: expected"),
        ({"reward_start": 100}, r"reward_start: expected below max_train_steps \(.*got 100"),
        ({"cache": True, "train_data_dir": "emoji"}, "cache: expected"),
        ({"validation_steps": 3, "logging_steps": 2}, "multiple of logging_steps"),
    ],
)
def test_bad_configs_are_refused_when_parsed(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_ratio_that_no_timestep_has_is_refused(config):
    with pytest.raises(ValueError, match=r"reward_min_snr: expected at most 1.*first timestep, got 1e\+12"):
        train(config(reward_min_snr=1e12))


@pytest.mark.parametrize("name", ["timestep_shift", "train_guidance_scale"])
def test_a_setting_of_another_family_is_refused(config, name):
    with pytest.raises(ValueError, match=f"{name}: .* has no use of it: leave it at 1"):
        train(config(**{name: 3.0}))


def test_a_reward_without_gradient_is_refused_and_trains_without(config):
    rounded = ConditionConfig("tests.toy_conditions:Rounded")
    with pytest.raises(ValueError, match="Rounded: the score has no gradient"):
        train(config(condition=rounded))
    train(config("plain", condition=rounded, reward_weight=0.0, max_train_steps=1))


def test_bad_data_is_refused_before_the_run_begins(config, tmp_path):
    write_folder(tmp_path / "data", number=2)
    (tmp_path / "data/images/1.png").write_bytes(b"no image")
    cfg = config(train_data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="images/1.png: not a readable image"):
        train(cfg)
    assert not Path(cfg.output_dir).exists()


def test_a_timestep_beyond_the_schedule_is_refused(config):
    with pytest.raises(ValueError, match="at most 999, got 1000"):
        train(config(reward_timesteps=[0, 1000]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_base_trains_float32_weights_for_twenty_steps(config, precision):
    """With hardly a step that fp16's loss scale throws away."""
    folder = train(config(mixed_precision=precision, max_train_steps=20, train_batch_size=1, reward_timesteps=ALL))
    skipped = [event for event in read_events(folder / "events.jsonl") if event["type"] == "skipped"]
    assert len(skipped) <= 2
    assert len(scalars(folder)) == 20 and all(math.isfinite(event["reward_loss"]) for event in scalars(folder))
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {torch.float32}


def test_images_that_are_not_finite_stop_the_run_with_the_samples_number(config, monkeypatch):
    draw = controlnetpp.draw
    broken = torch.full((3, 16, 16), math.nan)
    monkeypatch.setattr(controlnetpp, "draw", lambda *args: draw(*args)._replace(rewarded=args[-1] == 0))
    monkeypatch.setattr(
        controlnetpp.Validation,
        "measure",
        lambda self: (torch.zeros(3, 3, 16, 16), {"validation/reward_loss": torch.zeros(3)}),
    )
    monkeypatch.setattr("alignkit.base.Base.decode", lambda self, latents: broken.repeat(len(latents), 1, 1, 1))
    with pytest.raises(FloatingPointError, match=r"not finite at step 0, samples \[0\] of \[0, 1\]"):
        train(config())


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    monkeypatch.setattr("alignkit.base.Base.encode", lambda self, images: torch.full((len(images), 4, 8, 8), math.nan))
    cfg = config()
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        train(cfg)
    assert not (Path(cfg.output_dir) / WEIGHTS).exists()


def test_an_early_stop_keeps_the_best_controlnet_also_after_a_resume(config, monkeypatch):
    """Monitors 0, 1, 3, 1, 1 while the consistency rises: it ends after four steps with what it had after two."""
    monitors = [0.0, 1.0, 3.0, 1.0, 1.0]

    def summary(self, step, images, measured, start):
        return {"step": step, "reward": float(step), "diversity": 1.0, "monitors": {"monitor/Red": monitors[step]}}

    monkeypatch.setattr(controlnetpp.Validation, "summary", summary)
    fields = {"validation_steps": 1, "checkpointing_steps": 1, "early_stop": EarlyStopConfig(enabled=True)}
    two = train(config("two", max_train_steps=2, **fields))
    stopped = train(config("stopped", max_train_steps=9, **fields))
    assert_same(stopped, two)
    assert "the ControlNet is that of step 2" in (stopped / "README.md").read_text()
    train(config("resumed", max_train_steps=3, **fields))
    assert_same(train(config("resumed", max_train_steps=9, **fields)), two)


def test_the_summary_of_a_validation():
    """Gains of monitors over the start, in its standard deviations; the consistency and the spread of the images."""
    measured = {"validation/reward_loss": torch.tensor([1.0, 3.0]), "monitor/Red": torch.tensor([2.0, 4.0])}
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    got = controlnetpp.Validation.summary(None, 5, images, measured, {"monitor/Red": [1.0, 4.0]})
    assert got == {
        "step": 5,
        "reward": -2.0,
        "diversity": pytest.approx(1.0),
        "monitors": {"monitor/Red": 0.5},
    }


# Configs


def test_dry_run_measures_and_writes_nothing(config, capsys):
    cfg = config(dry_run=True, validation_steps=2, reward_start=100)
    with pytest.raises(SystemExit) as stop:
        train(cfg)
    assert stop.value.code in (0, None)
    out = capsys.readouterr().out
    assert "s a validation" in out and "s a step" in out
    assert not Path(cfg.output_dir).exists()


CONFIGS = sorted((ROOT / "configs" / "controlnetpp").rglob("*.yaml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 6 and {"sd15_depth", "sdxl_depth", "sd3_depth", "flux_depth"} <= {c.stem for c in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_dry_run(path, data, tmp_path, monkeypatch, capsys):
    """On random weights; judges and data that are not here are replaced by what needs none."""
    monkeypatch.chdir(ROOT)
    assert f"training/controlnetpp.py --config {path.relative_to(ROOT)}" in path.read_text()
    # Not 32: SD 1.5's last downsampler would see latents of 1 x 1, where the weight gradient that oneDNN makes of a
    # bfloat16 convolution with stride 2 holds uninitialised memory, now and then NaN.
    small = ["--dry_run", "--random_init", "--shrink", "40", "--resolution", "64", "--train_batch_size", "1"]
    small += ["--gradient_accumulation_steps", "1", "--num_inference_steps", "2", "--num_validation_images", "1"]
    cfg = parse(Config, ["--config", str(path), *small, "--output_dir", str(tmp_path / "run")])
    cfg.monitors = []
    if cfg.condition.name == "segmentation":
        cfg.condition.args = {"model": save_segmenter(tmp_path / "judge", num_labels=400)}
    if cfg.condition.name == "depth":
        cfg.condition.args = {"model": save_estimator(tmp_path / "judge")}
    if cfg.train_data_dir != "emoji":
        cfg.train_data_dir, cfg.validation_data_dir = data, None
    with pytest.raises(SystemExit) as stop:
        train(cfg)
    assert stop.value.code in (0, None) and "s a step" in capsys.readouterr().out
