"""training/ddpo.py on a randomly initialised model of a few thousand parameters, from config to card."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignkit.artifacts import LORA_WEIGHTS, remove
from alignkit.base import Base, add_lora, load_base
from alignkit.config import LoraConfig, parse
from alignkit.data import Prompts, read_prompts
from alignkit.emoji import WEIGHTS_DIR
from alignkit.reward_tuning import Judges
from alignkit.rewards import RewardConfig, combine
from alignkit.run import Run
from tests.runs import assert_same, reproducible, scalars, tuning_configs
from tests.tiny import save_tiny_model
from tests.torchrun import train_on_two_ranks
from training import ddpo
from training.ddpo import Config, clipped_loss, normalise, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """Of three trailing steps from 999 on, two are actions that change what is drawn."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_spacing": "trailing"}))
    return str(folder)


@pytest.fixture
def config(tiny_model, tmp_path):
    """Makes a Config of 2 rounds of 2 updates of 4 images in 3 steps."""
    own = {
        "rewards": [RewardConfig("tests.toy_rewards:Detached")],  # which needs no gradient
        "num_images_per_prompt": 4,
        "per_prompt_min_count": 4,
        "num_inference_steps": 3,
        "updates_per_round": 2,
        "num_validation_images": 2,
    }
    return tuning_configs(Config, tiny_model, tmp_path, **own)


# The formulas


def test_clipped_loss_by_hand():
    """Where the ratio has moved in the advantage's favour beyond the range, there is no gradient."""
    ratio = torch.tensor([0.8, 0.95, 1.05, 1.2] * 2, requires_grad=True)
    advantages = torch.tensor([2.0] * 4 + [-2.0] * 4)
    loss = clipped_loss(ratio, advantages, 0.1)
    torch.testing.assert_close(loss, torch.tensor([-1.6, -1.9, -2.1, -2.2, 1.8, 1.9, 2.1, 2.4]))
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 2.0]))


def test_advantages_have_mean_0_and_deviation_1_for_each_prompt(config):
    cfg = config()
    prompts, rewards = ["a"] * 4 + ["b"] * 4, [1.0, 2.0, 3.0, 4.0, 10.0, 30.0, 20.0, 50.0]
    advantages, latest = normalise(prompts, rewards, {}, cfg)
    advantages = torch.tensor(advantages, dtype=torch.float64).view(2, 4)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(2).double(), rtol=0, atol=1e-5)
    assert latest == {"a": rewards[:4], "b": rewards[4:]}


def test_a_prompt_seen_too_seldom_takes_the_rounds_statistics(config):
    """a has three rewards with its older ones, b and c have one: mean 4 and deviation sqrt(6) of 1, 4, 7."""
    cfg = config(per_prompt_min_count=3, per_prompt_buffer_size=3)
    advantages, latest = normalise(["a", "b", "c"], [1.0, 4.0, 7.0], {"a": [0.0, 3.0, 5.0], "d": [1.0]}, cfg)
    a = (1 - 3) / torch.tensor([3.0, 5.0, 1.0]).std(correction=0).item()
    assert advantages == pytest.approx([a, 0, 3 / 6**0.5], abs=1e-5)
    assert latest == {"a": [3.0, 5.0, 1.0], "b": [4.0], "c": [7.0], "d": [1.0]}
    advantages, _ = normalise(["a"] * 3, [0.0, 0.0, 1000.0], {}, replace(cfg, adv_clip_max=1.25))
    assert advantages[2] == 1.25


def test_at_ratio_1_the_gradient_is_reinforces(config, tiny_model):
    """- A grad log p, summed over steps: of the densities of torch.distributions, times the numbers of a latent."""
    cfg, run = config(), Run(config())
    base = load_base(tiny_model, random_init=True)
    lora = add_lora(base.unet, 2, 2, ["to_q", "to_v"])
    for parameter in lora.values():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    run.prepare(lora)
    batch, advantages = Prompts(["a cat", "a dog"], {}), torch.tensor([1.5, -0.5])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    rollout = ddpo.draw_rollout(cfg, base, Judges(combine(cfg.rewards), None), batch, generators)
    assert len(rollout.latents) == 3 and rollout.log_probs.shape == (2, 2)

    next(run.micro_batches(0))
    logged = ddpo.policy_update(run, cfg, base, rollout, advantages)
    torch.testing.assert_close(logged["policy_loss"], -advantages)
    assert not logged["approx_kl"].any() and not logged["clip_fraction"].any()
    ours = [parameter.grad.clone() * run.global_batch for parameter in lora.values()]

    denoiser, actions, _ = ddpo.policy(cfg, base, batch.prompts)
    expected = 0.0
    for i, (timestep, prev_timestep) in enumerate(actions):
        x_t, x_prev = rollout.latents[i], rollout.latents[i + 1]
        mean = base.schedule.ddim_step(
            x_t, denoiser(x_t, timestep), timestep, prev_timestep, 1.0, torch.zeros_like(x_t)
        )
        std = base.schedule.ddim_std(timestep, prev_timestep, 1.0).float()
        log_prob = torch.distributions.Normal(mean, std).log_prob(x_prev).mean((1, 2, 3))
        expected = expected - (advantages * log_prob).sum() / len(actions)
    for gradient, wanted in zip(ours, torch.autograd.grad(expected, lora.values()), strict=True):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


# Training


def test_the_ratio_is_1_until_the_first_update_and_not_after(config):
    folder = train(config(num_inner_epochs=2, clip_range=1e-6))
    events = scalars(folder)
    assert [event["clip_fraction"] > 0 for event in events] == [False, True, True, True]
    assert events[0]["approx_kl"] == 0 and events[1]["approx_kl"] > 0
    assert [event["images_scored"] for event in events] == [8] * 4


def test_learns_a_toy_reward_that_has_no_gradient(config, monkeypatch):
    """Mean colour of squashed latents, as in AlignProp's test: the policy gradient moves it up."""
    monkeypatch.setattr(Base, "decode", lambda self, latents: torch.sigmoid(latents[:, :3] / 4))
    fields = {"num_images_per_prompt": 16, "updates_per_round": 1, "train_batch_size": 16, "clip_range": 0.1}
    fields |= {"gradient_accumulation_steps": 1, "per_prompt_min_count": 16, "learning_rate": 2e-2}
    folder = train(config(max_train_steps=25, guidance_scale=1.0, **fields))
    rewards = [event["reward/Detached"] for event in scalars(folder)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards


def test_the_folder_of_a_run(config):
    folder = train(config(validation_steps=2, monitors=[RewardConfig("tests.toy_rewards:Red")]))
    assert {"reward/Detached", "monitor/Red", "diversity", "policy_loss", "grad_norm"} <= scalars(folder)[0].keys()
    assert [event["step"] for event in scalars(folder) if "validation/loss" in event] == [1, 3]
    assert (folder / "before_after.png").is_file() and "ddpo" in (folder / "README.md").read_text()


def test_a_resumed_run_equals_an_uninterrupted_one(config):
    """Stopped at the end of a round, and within one, which is then drawn again by the policy that drew it."""
    fields = {"checkpointing_steps": 1, "num_images_per_prompt": 2, "per_prompt_min_count": 3, "use_ema": True}
    whole = train(config("whole", **fields, checkpoints_total_limit=None))
    for stopped_at in (2, 3):
        cfg = config(f"resumed_{stopped_at}", **fields)
        resumed = shutil.copytree(whole, cfg.output_dir)
        for step in range(stopped_at + 1, 5):
            remove(Path(resumed) / f"checkpoint-{step}")
        remove(Path(resumed) / LORA_WEIGHTS)
        folder = train(cfg)
        assert_same(whole, folder)
        assert reproducible(folder) == reproducible(whole) and len(scalars(folder)) == 4


def test_two_processes_equal_one(config):
    """A real torchrun of the script: advantages need the rewards of both."""
    fields = {"learning_rate": 1e-3, "validation_steps": 4}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: more would round differently
    one = train(config("one", **fields))
    torch.set_num_threads(threads)
    two = train_on_two_ranks("training/ddpo.py", config("two", **fields, gradient_accumulation_steps=1))
    assert_same(one, two, tolerance=1e-5)
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        for name in ("loss", "reward/Detached", "diversity", "grad_norm", "policy_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6)


def test_the_images_of_a_prompt_are_spread_over_its_round(config):
    """8 images of a round, 4 a prompt: two prompts in turn, others in the next round."""
    cfg, run = config(), Run(config())
    chosen = [ddpo.prompt_of(run, cfg, 5, index) for index in range(16)]
    assert chosen[:2] * 4 == chosen[:8] and chosen[8:10] * 4 == chosen[8:] and len({*chosen}) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eta": 0.0}, "without noise"),
        ({"num_inference_steps": 1}, "num_inference_steps: expected at least 2"),
        ({"clip_range": 0.0}, "clip_range: expected above 0"),
        ({"updates_per_round": 0}, "updates_per_round: expected at least 1"),
        ({"per_prompt_min_count": 17}, r"per_prompt_buffer_size \(16\), got 17"),
        ({"lora": LoraConfig(dropout=0.1)}, "lora.dropout: expected 0"),
    ],
)
def test_bad_configs_are_refused_when_parsed(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_what_is_refused_at_the_start(config):
    with pytest.raises(ValueError, match="num_images_per_prompt: expected a divisor of the round's 8 samples"):
        train(config(num_images_per_prompt=3))
    nan = RewardConfig("tests.toy_rewards:NaNFor", args={"prompt": "a bus"})
    with pytest.raises(FloatingPointError, match=r"rewards of the samples \[\d.* not finite"):
        train(config(rewards=[nan], num_images_per_prompt=1, max_train_steps=4))


CONFIGS = sorted((ROOT / "configs" / "ddpo").rglob("*.yaml"))


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if path.stem == "sdxl" else ()) for path in CONFIGS],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_configs_dry_run(path, tmp_path, monkeypatch, capsys):
    """On random weights; the judges of a model that is not bundled are replaced by one that needs no weights."""
    monkeypatch.chdir(ROOT)
    assert f"training/ddpo.py --config {path.relative_to(ROOT)}" in path.read_text()
    small = ["--dry_run", "true", "--random_init", "true", "--shrink", "40", "--resolution", "64"]
    small += ["--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--num_inference_steps", "2"]
    small += ["--num_validation_images", "2", "--num_images_per_prompt", "1", "--output_dir", str(tmp_path / "run")]
    cfg = parse(Config, ["--config", str(path), *small])
    assert len(read_prompts(cfg.prompt_file))
    if cfg.pretrained_model_name_or_path != "emoji":
        cfg = replace(cfg, rewards=[RewardConfig("compressibility")], monitors=[])
    elif not (WEIGHTS_DIR / "figures.json").exists():
        pytest.skip("the emoji world is not trained yet")
    with pytest.raises(SystemExit) as stop:
        train(cfg)
    assert stop.value.code in (0, None) and "s a step" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
