"""Gradient plans against finite differences, plain autograd, each other, and what their papers say they draw.

The network is a randomly initialised UNet2DConditionModel of 60 k parameters with a LoRA whose B is not zero (else A
has no gradient); the reward is <w, x_0> for a fixed random w.
"""

import math
from collections import Counter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor

from alignkit.noise import NoiseSchedule
from alignkit.sampling import PLANS, GradientPlan, guided, sample
from tests.tiny import ddim, tiny_unet


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SCHEDULE = NoiseSchedule.from_scheduler(ddim())
TRAILING = NoiseSchedule.from_scheduler(ddim(timestep_spacing="trailing"))


class Tiny:
    """A frozen U-Net with a trainable LoRA, two prompts, and the pieces of a run."""

    def __init__(self, dtype=torch.float32, lora_dropout=0.0, batch=2):
        torch.manual_seed(0)
        unet = tiny_unet().requires_grad_(False)
        unet.add_adapter(
            LoraConfig(r=4, lora_dropout=lora_dropout, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        self.lora = [p for p in unet.parameters() if p.requires_grad]
        for parameter in self.lora:
            parameter.data = 0.2 * torch.randn(parameter.shape)
        self.unet = unet.train().to(dtype)
        if dtype != torch.float64:
            for parameter in self.lora:
                parameter.data = parameter.data.float()
        wide = torch.promote_types(dtype, torch.float32)
        self.prompt_embeds, self.negative_prompt_embeds = torch.randn(2, batch, 5, 16).to(wide)
        self.x_T = torch.randn(batch, 4, 8, 8).to(wide)
        self.w = torch.randn(batch, 4, 8, 8).to(wide)

    def unet_forward(self, x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        dtype = self.unet.conv_in.weight.dtype
        output = self.unet(x_t.to(dtype), timestep, encoder_hidden_states=prompt_embeds.to(dtype)).sample
        return output.to(x_t.dtype)

    def denoiser(self, guidance_scale=1.0, detach_uncond=False):
        return guided(self.unet_forward, self.prompt_embeds, self.negative_prompt_embeds, guidance_scale, detach_uncond)

    def reward(self, x_0: Tensor) -> Tensor:
        copies = x_0.shape[0] // self.w.shape[0]
        return (self.w.repeat(copies, 1, 1, 1) * x_0).mean()

    def gradient(self, x_0: Tensor, retain_graph=False) -> Tensor:
        gradients = torch.autograd.grad(self.reward(x_0), self.lora, retain_graph=retain_graph)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def plan_gradient(self, plan: GradientPlan, schedule=SCHEDULE, guidance_scale=1.0, detach_uncond=False, **settings):
        torch.manual_seed(1)  # LoRA dropout draws from the global generator
        timesteps = schedule.timesteps(plan.num_inference_steps)
        denoiser = self.denoiser(guidance_scale, detach_uncond)
        return self.gradient(sample(denoiser, self.x_T, schedule, timesteps, plan, **settings))


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny()


def suffix(n: int, k: int) -> GradientPlan:
    return PLANS["draft_k"](n, rng(), k=k)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_network_is_small(tiny):
    assert sum(p.numel() for p in tiny.unet.parameters()) < 100_000


# Gradients


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize(("eta", "lora_dropout"), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.3), (1.0, 0.3)])
def test_checkpointing_changes_no_bit(k, eta, lora_dropout):
    tiny = Tiny(lora_dropout=lora_dropout)
    on, off = (
        tiny.plan_gradient(suffix(10, k), eta=eta, generator=rng(), checkpoint=checkpoint)
        for checkpoint in (True, False)
    )
    assert on.abs().sum() > 0
    assert torch.equal(on, off)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_full_chain_matches_finite_differences_in_float64(checkpoint):
    """Central difference along a random direction: error O(h^2) + O(eps / h), 1e-8 and 1e-12 for h = 1e-4."""
    tiny, h, timesteps = Tiny(torch.float64), 1e-4, SCHEDULE.timesteps(4)
    gradient = tiny.plan_gradient(suffix(4, 4), guidance_scale=3.0, checkpoint=checkpoint)
    direction = torch.randn(gradient.shape, generator=rng(), dtype=torch.float64)
    direction /= direction.norm()
    rewards = {}
    for sign in (1, -1):
        for parameter, step in zip(tiny.lora, direction.split([p.numel() for p in tiny.lora]), strict=True):
            parameter.data += sign * h * step.view_as(parameter)
        with torch.no_grad():
            rewards[sign] = tiny.reward(sample(tiny.denoiser(3.0), tiny.x_T, SCHEDULE, timesteps, None))
        for parameter, step in zip(tiny.lora, direction.split([p.numel() for p in tiny.lora]), strict=True):
            parameter.data -= sign * h * step.view_as(parameter)
    finite_difference = (rewards[1] - rewards[-1]) / (2 * h)
    assert abs(finite_difference / (gradient @ direction) - 1) < 1e-7


def test_the_prefix_without_graph_equals_a_detached_prefix(tiny):
    n, k, timesteps = 10, 4, SCHEDULE.timesteps(10)
    denoiser, x_t = tiny.denoiser(), tiny.x_T
    for i, timestep in enumerate(timesteps):
        output = denoiser(x_t, timestep)
        if i < n - k:
            output = output.detach()
        x_t = SCHEDULE.ddim_step(x_t, output, timestep, timesteps[i + 1] if i + 1 < n else None)
    assert torch.equal(tiny.plan_gradient(suffix(n, k)), tiny.gradient(x_t))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_a_suffix_is_plain_autograd_through_the_stock_scheduler(tiny, k):
    """The independent side: diffusers' DDIMScheduler.step, started at the stored x_{N-K}."""
    stock = ddim()
    stock.set_timesteps(10)
    denoiser, x_t = tiny.denoiser(), tiny.x_T
    for i, timestep in enumerate(stock.timesteps):
        if i == 10 - k:
            x_t = x_t.detach()
        x_t = stock.step(denoiser(x_t, timestep), timestep, x_t).prev_sample
    assert relative(tiny.plan_gradient(suffix(10, k)), tiny.gradient(x_t)) < 1e-5


def test_kept_steps_between_cut_ones_keep_the_linear_path(tiny):
    """stochastic_detach by its definition: every step attached, the output of each cut step detached."""
    n, timesteps, kept = 8, SCHEDULE.timesteps(8), (1, 2, 5)
    denoiser, x_t = tiny.denoiser(), tiny.x_T
    for i, timestep in enumerate(timesteps):
        output = denoiser(x_t, timestep)
        output = output if i in kept else output.detach()
        x_t = SCHEDULE.ddim_step(x_t, output, timestep, timesteps[i + 1] if i + 1 < n else None)
    expected = tiny.gradient(x_t)
    assert torch.equal(tiny.plan_gradient(GradientPlan(n, kept)), expected)
    assert relative(tiny.plan_gradient(suffix(n, 3)), expected) > 0.5  # and it is another gradient than a suffix's


def test_drtune_and_refl_by_their_definitions(tiny):
    """DRTune: network input detached, linear path kept, reward on the stop's predicted x_0. ReFL: one such step."""
    n, timesteps, kept, stop = 8, SCHEDULE.timesteps(8), (1, 3, 5), 6
    denoiser, x_t = tiny.denoiser(), tiny.x_T
    for i in range(stop + 1):
        output = denoiser(x_t.detach(), timesteps[i])
        output = output if i in kept else output.detach()
        if i < stop:
            x_t = SCHEDULE.ddim_step(x_t, output, timesteps[i], timesteps[i + 1])
    expected = tiny.gradient(SCHEDULE.predict_x_0(output, x_t, timesteps[stop]))
    assert torch.equal(tiny.plan_gradient(GradientPlan(n, kept, detach_input=True, stop=stop)), expected)

    with torch.no_grad():
        x_t = tiny.x_T
        for i in range(stop):
            x_t = SCHEDULE.ddim_step(x_t, denoiser(x_t, timesteps[i]), timesteps[i], timesteps[i + 1])
    expected = tiny.gradient(SCHEDULE.predict_x_0(denoiser(x_t, timesteps[stop]), x_t, timesteps[stop]))
    assert torch.equal(tiny.plan_gradient(GradientPlan(n, (stop,), stop=stop)), expected)


def test_with_one_step_drtune_and_lv_are_draft(tiny):
    draft = tiny.plan_gradient(suffix(10, 1))
    assert torch.equal(tiny.plan_gradient(GradientPlan(10, (9,), detach_input=True)), draft)
    assert torch.equal(tiny.plan_gradient(PLANS["draft_lv"](10, rng(), copies=0)), draft)


def test_lv_copies_are_the_last_step_from_renoised_x_0(tiny):
    timesteps, n = TRAILING.timesteps(4), 2
    plan = PLANS["draft_lv"](4, rng(), copies=n)
    images = sample(tiny.denoiser(), tiny.x_T, TRAILING, timesteps, plan, generator=rng(5))
    assert images.shape == (3 * 2, 4, 8, 8)
    x_0, generator = images[:2].detach(), rng(5)
    for copy in images[2:].chunk(n):
        noise = torch.randn(x_0.shape, generator=generator)
        x_t = TRAILING.add_noise(x_0, noise, timesteps[-1])
        expected = TRAILING.ddim_step(x_t, tiny.denoiser()(x_t, timesteps[-1]), timesteps[-1], None)
        assert torch.equal(copy, expected)


def test_lv_variance_given_x_0_falls_as_one_over_copies(tiny):
    """The copies are independent given x_0, so the variance of their mean gradient is 1/n of one copy's.

    n = 4 and 16 draws; trailing spacing, since at t = 1 there is little variance to reduce.
    """
    timesteps, plan = TRAILING.timesteps(1), PLANS["draft_lv"](1, rng(), copies=4)
    one, mean = [], []
    for seed in range(16):
        images = sample(tiny.denoiser(), tiny.x_T, TRAILING, timesteps, plan, generator=rng(seed), checkpoint=False)
        mean.append(tiny.gradient(images[2:], retain_graph=True))
        one.append(tiny.gradient(images[2:4]))
    variance_of_mean, variance_of_one = (torch.stack(gradients).var(dim=0).sum() for gradients in (mean, one))
    assert 0.15 < variance_of_mean / variance_of_one < 0.4


def test_flow_models_go_through_the_same_loop(tiny):
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = NoiseSchedule.from_scheduler(stock)
    stock.set_timesteps(6)
    x_t = tiny.x_T
    for timestep in stock.timesteps:
        x_t = stock.step(tiny.denoiser()(x_t, timestep), timestep, x_t).prev_sample
    assert relative(tiny.plan_gradient(suffix(6, 6), schedule), tiny.gradient(x_t)) < 1e-4


# Guidance


def test_batched_guidance_is_two_calls(tiny):
    x_t, timestep, w = tiny.x_T, torch.tensor(501), 7.5
    cond = tiny.unet_forward(x_t, timestep, tiny.prompt_embeds)
    uncond = tiny.unet_forward(x_t, timestep, tiny.negative_prompt_embeds)
    torch.testing.assert_close(tiny.denoiser(w)(x_t, timestep), w * cond + (1 - w) * uncond, rtol=1e-4, atol=1e-5)


def test_guidance_gradient_is_the_sum_of_its_branches(tiny):
    """At K = 1 the gradient is linear in the output, w cond + (1 - w) uncond: each branch alone, then both."""
    w, plan = 5.0, suffix(10, 1)
    attached = tiny.plan_gradient(plan, guidance_scale=w)
    cond_only = tiny.plan_gradient(plan, guidance_scale=w, detach_uncond=True)

    def uncond_only(x_t: Tensor, timestep: Tensor) -> Tensor:
        cond = tiny.unet_forward(x_t, timestep, tiny.prompt_embeds).detach()
        return w * cond + (1 - w) * tiny.unet_forward(x_t, timestep, tiny.negative_prompt_embeds)

    x_0 = sample(uncond_only, tiny.x_T, SCHEDULE, SCHEDULE.timesteps(10), plan)
    assert relative(cond_only + tiny.gradient(x_0), attached) < 1e-5
    assert relative(cond_only, attached) > 0.1


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 2), (7.5, 4)])
def test_guidance_of_one_skips_the_unconditional_half(tiny, guidance_scale, rows):
    seen = []
    handle = tiny.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    sample(tiny.denoiser(guidance_scale), tiny.x_T, SCHEDULE, SCHEDULE.timesteps(5), None)
    handle.remove()
    assert seen == [rows] * 5


def test_guidance_without_a_negative_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="needs a negative condition"):
        guided(tiny.unet_forward, tiny.prompt_embeds, None, 7.5)
    with pytest.raises(ValueError, match="needs a negative condition"):
        guided(tiny.unet_forward, tiny.prompt_embeds, tiny.negative_prompt_embeds[:1], 7.5)


# Traps


def timesteps_seen(tiny: Tiny, plan: GradientPlan) -> list[Tensor]:
    seen = []
    handle = tiny.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    tiny.plan_gradient(plan)
    handle.remove()
    return seen


def test_recomputation_sees_the_timesteps_of_the_forward(tiny):
    """A closure over the loop's timestep would recompute every step at the last one: cosine 0.96 and no error."""
    plan, timesteps = GradientPlan(10, (2, 5, 7, 9)), SCHEDULE.timesteps(10).tolist()
    seen = [int(timestep) for timestep in timesteps_seen(tiny, plan)]
    assert seen[:10] == timesteps
    assert seen[10:] == [timesteps[i] for i in reversed(plan.steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_stay_integers_in_every_dtype(dtype):
    seen = timesteps_seen(Tiny(dtype), suffix(50, 1))[:50]
    assert all(timestep.dtype == torch.int64 for timestep in seen)
    assert torch.equal(torch.stack(seen), SCHEDULE.timesteps(50))


@pytest.mark.parametrize("k", [1, 5])
def test_a_bfloat16_base_under_a_float32_lora(tiny, k):
    half = Tiny(torch.bfloat16)
    gradient = half.plan_gradient(suffix(10, k))
    assert {p.dtype for p in half.lora} == {torch.float32} and gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient, tiny.plan_gradient(suffix(10, k)), dim=0) > 0.999


@pytest.mark.parametrize("plan", [suffix(4, 2), PLANS["draft_lv"](4, rng(), copies=2)])
def test_a_sample_does_not_depend_on_its_batch(tiny, plan):
    """With one generator per sample, a batch of two is two batches of one: the ground for accumulation and ranks."""

    def run(rows: list[int]) -> Tensor:
        denoiser = guided(tiny.unet_forward, tiny.prompt_embeds[rows], None, 1.0)
        generators = [rng(10 + row) for row in rows]
        timesteps = SCHEDULE.timesteps(4)
        with torch.no_grad():
            return sample(denoiser, tiny.x_T[rows], SCHEDULE, timesteps, plan, eta=1.0, generator=generators)

    together = run([0, 1])
    copies = len(together) // 2
    apart = torch.stack([run([0]), run([1])], dim=1).reshape(2 * copies, 4, 8, 8)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_no_graph_without_a_plan_or_under_no_grad(tiny):
    timesteps = SCHEDULE.timesteps(4)
    assert not sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, None).requires_grad
    with torch.no_grad():
        assert not sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, suffix(4, 2)).requires_grad
    with torch.no_grad(), torch.random.fork_rng():
        plain = sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, None)
    with_gradient = sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, suffix(4, 2))
    assert torch.equal(plain, with_gradient)


def test_sampling_mistakes_are_refused(tiny):
    timesteps = SCHEDULE.timesteps(4)
    with pytest.raises(ValueError, match="plan is for 5 steps, but there are 4"):
        sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, suffix(5, 1))
    with pytest.raises(ValueError, match="pass a generator"):
        sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, suffix(4, 1), eta=1.0)
    with pytest.raises(ValueError, match="pass a generator"):
        sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, PLANS["draft_lv"](4, rng()))


# Memory


def saved_bytes(tiny: Tiny, n: int, k: int, checkpoint: bool) -> int:
    """What autograd keeps for the backward pass of one chain, parameters excluded."""
    parameters = {p.data_ptr() for p in tiny.unet.parameters()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        timesteps = SCHEDULE.timesteps(n)
        x_0 = sample(tiny.denoiser(), tiny.x_T, SCHEDULE, timesteps, suffix(n, k), checkpoint=checkpoint)
    del x_0
    return sum(saved.values())


def test_memory_of_a_truncated_chain_does_not_grow_with_its_length(tiny):
    for checkpoint in (True, False):
        assert saved_bytes(tiny, 20, 1, checkpoint) == saved_bytes(tiny, 10, 1, checkpoint)


def test_memory_of_the_full_chain(tiny):
    full = {n: saved_bytes(tiny, n, n, checkpoint=False) for n in (5, 10)}
    assert 1.9 < full[10] / full[5] < 2.1
    assert full[10] / saved_bytes(tiny, 10, 10, checkpoint=True) > 100


# Plans


def test_uniform_draws_every_k():
    """20 000 draws of K in 1..N: mean (N + 1) / 2 with standard error 14.4 / sqrt(20000) = 0.1."""
    generator = rng()
    counts = Counter(len(PLANS["alignprop"](50, generator).steps) for _ in range(20_000))
    assert sorted(counts) == list(range(1, 51))
    assert sum(k * count for k, count in counts.items()) / 20_000 == pytest.approx(25.5, abs=0.4)


def test_gaussian_draws_are_those_of_the_authors_code():
    """int(Normal(42, 5)) of 50, rejected outside [1, 49]: K = 50 - T has mean 9.1, sd 4.5, P(K = 1) = 0.027."""
    generator = rng()
    k = torch.tensor(
        [len(PLANS["alignprop"](50, generator, distribution="gaussian").steps) for _ in range(20_000)]
    ).double()
    assert k.mean().item() == pytest.approx(9.1, abs=0.1)
    assert k.std().item() == pytest.approx(4.5, abs=0.1)
    assert (k == 1).double().mean().item() == pytest.approx(0.027, abs=0.004)
    explicit = PLANS["alignprop"](50, rng(3), distribution="gaussian", mean=42, std=5)
    assert explicit == PLANS["alignprop"](50, rng(3), distribution="gaussian")


def test_stochastic_detach_keeps_step_i_with_probability_i_plus_1_over_n_plus_1():
    n, draws, generator = 20, 4000, rng()
    counts = Counter(i for _ in range(draws) for i in PLANS["stochastic_detach"](n, generator).steps)
    for i in range(n):
        p = (i + 1) / (n + 1)
        assert abs(counts[i] / draws - p) < 3 * math.sqrt(p * (1 - p) / draws)


def test_refl_stops_in_the_last_quarter():
    generator = rng()
    plans = [PLANS["refl"](40, generator) for _ in range(500)]
    assert {plan.stop for plan in plans} == set(range(30, 40))
    assert all(plan.steps == (plan.stop,) for plan in plans)


def test_drtune_draws_equally_spaced_steps_before_its_stop():
    generator = rng()
    plans = [PLANS["drtune"](25, generator) for _ in range(500)]
    assert {plan.stop for plan in plans} == set(range(15, 25))  # the last 0.4 of 25
    for plan in plans:
        a, b, c = plan.steps
        assert b - a == c - b == (plan.stop + 1) // 3 and plan.detach_input
    assert PLANS["drtune"](25, generator, early_stop_ratio=0.0).stop is None
    assert PLANS["drtune"](5, generator, k=5, early_stop_ratio=0.0).steps == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("n", [4, 25])
def test_the_same_generator_draws_the_same_plan(name, n):
    """Every rank draws for itself, from the same seed."""
    first, second, third = rng(7), rng(7), rng(8)
    plans = [PLANS[name](n, first) for _ in range(20)]
    assert plans == [PLANS[name](n, second) for _ in range(20)]
    if name not in ("full", "draft_k", "draft_lv") and n > 4:
        assert plans != [PLANS[name](n, third) for _ in range(20)]


def test_fixed_full_and_draft_are_suffixes():
    assert PLANS["alignprop"](10, rng(), distribution="fixed", k=3) == PLANS["draft_k"](10, rng(), k=3)
    assert PLANS["full"](10, rng()) == PLANS["draft_k"](10, rng(), k=10)
    assert PLANS["draft_k"](10, rng()).steps == (9,)


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("draft_k", {"k": 0}, "between 1 and num_inference_steps 10, got 0"),
        ("draft_k", {"k": 11}, "got 11"),
        ("drtune", {"k": 11}, "got 11"),
        ("drtune", {"early_stop_ratio": 1.5}, "between 0 and 1"),
        ("alignprop", {"distribution": "fixed", "k": 11}, "got 11"),
        ("alignprop", {"distribution": "fixed"}, "k is the setting of distribution fixed"),
        ("alignprop", {"k": 5}, "k is the setting of distribution fixed"),
        ("alignprop", {"mean": 5.0}, "settings of distribution gaussian"),
        ("alignprop", {"distribution": "normal"}, "uniform, gaussian or fixed"),
        # 20 steps with the authors' mean for 50 makes their rejection loop run for ever
        ("alignprop", {"distribution": "gaussian", "mean": 49.0, "std": 1.0}, "does not reach"),
        ("alignprop", {"distribution": "gaussian", "std": 0.0}, "positive"),
        ("refl", {"first_stop": 10}, "between 0 and 9, got 10"),
        ("draft_lv", {"copies": -1}, "not be negative"),
    ],
)
def test_bad_settings_are_refused_before_any_work(name, settings, message):
    with pytest.raises(ValueError, match=message):
        PLANS[name](10, rng(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": ()}, "keeps none"),
        ({"steps": (10,)}, "between 0 and 9"),
        ({"steps": (-1,)}, "between 0 and 9"),
        ({"steps": (5, 4)}, "ascend"),
        ({"steps": (4, 4)}, "ascend"),
        ({"steps": (7,), "stop": 6}, "between 0 and 6"),
        ({"steps": (7,), "stop": 10}, "stop must be"),
        ({"steps": (7,), "stop": 7, "lv_copies": 1}, "cannot be combined"),
    ],
)
def test_impossible_plans_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientPlan(10, **settings)
