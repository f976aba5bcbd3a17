"""training/alignprop.py on a randomly initialised model of a few thousand parameters, from config to card."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from PIL import Image
from safetensors.torch import load_file

from alignkit.artifacts import LORA_WEIGHTS, load_json, read_events
from alignkit.base import Base, add_lora, load_base
from alignkit.config import LoraConfig, parse, to_dict
from alignkit.data import read_prompts
from alignkit.early_stop import EarlyStopConfig, best_of, diversity, gains, monitor_scores, reason_to_stop
from alignkit.emoji import WEIGHTS_DIR
from alignkit.reward_tuning import Validation, lora_norm
from alignkit.rewards import RewardConfig
from alignkit.sampling import PLANS
from tests.runs import assert_same, reproducible, scalars, tuning_configs
from tests.tiny import save_tiny_model
from tests.torchrun import train_on_two_ranks
from training import alignprop
from training.alignprop import Config, PlanConfig, train

ROOT = Path(__file__).parent.parent
RED = "tests.toy_rewards:Red"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """A diffusers folder of configs, for random_init."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def config(tiny_model, tmp_path):
    """Makes a Config of 4 updates of 4 images in 4 steps."""
    own = {"rewards": [RewardConfig(RED)], "num_inference_steps": 4, "num_validation_images": 4}
    return tuning_configs(Config, tiny_model, tmp_path, **own)


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / LORA_WEIGHTS)


# It learns


LEARNING = {"alignprop": PlanConfig()} | {f"draft_{k}": PlanConfig("draft_k", {"k": k}) for k in (1, 2, 4)}


@pytest.mark.parametrize("plan", LEARNING.values(), ids=LEARNING)
def test_learns_a_toy_reward(config, plan, monkeypatch):
    """From 0 to above 0.5 in 25 updates, by a mean shift of two latent channels.

    Latents are squashed to colours: the group norms of a VAE of random weights take out what a mean shift does.
    """
    monkeypatch.setattr(Base, "decode", lambda self, latents: torch.sigmoid(latents[:, :3] / 4))
    folder = train(config(plan=plan, max_train_steps=25, gradient_accumulation_steps=1, train_batch_size=4))
    rewards = [event["reward/Red"] for event in scalars(folder)]
    assert abs(rewards[0]) < 0.4 and sum(rewards[-5:]) / 5 > 0.5, rewards


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_moves_the_lora(config, name):
    settings = {"draft_lv": {"copies": 2}}.get(name, {})
    folder = train(config(plan=PlanConfig(name, settings), max_train_steps=1))
    assert all(tensor.abs().sum() > 0 for key, tensor in lora_of(folder).items() if "lora_B" in key or "up" in key)


def test_all_the_rest_at_once(config):
    """Column, weighted sum, losses, monitors, eta, dropout, EMA, bf16, cut guidance, repeated prompts: one update."""
    prompts = Path(config().prompt_file).with_suffix(".jsonl")
    prompts.write_text('{"prompt": "a cat", "wanted": 1}\n{"prompt": "a dog", "wanted": -1}\n')
    folder = train(
        config(
            prompt_file=str(prompts),
            rewards=[
                RewardConfig("tests.toy_rewards:Wanted", 2.0, "distance", 1.0),
                RewardConfig("compressibility", loss="hinge", target=10.0),
            ],
            monitors=[RewardConfig(RED), RewardConfig("incompressibility")],
            plan=PlanConfig("alignprop", {"distribution": "gaussian"}),
            lora=LoraConfig(rank=2, alpha=4, dropout=0.1),
            eta=1.0,
            use_ema=True,
            mixed_precision="bf16",
            detach_uncond=True,
            num_images_per_prompt=2,
            max_train_steps=1,
            validation_steps=1,
        )
    )
    (event,) = scalars(folder)
    assert {
        "loss",
        "reward/Wanted",
        "reward/compressibility",
        "monitor/Red",
        "monitor/incompressibility",
        "diversity",
        "grad_norm",
        "k",
        "validation/loss",
        "validation/monitor/Red",
        "validation/diversity",
        "drift/images",
        "drift/lora_norm",
        "learning_rate",
        "images_per_second",
        "memory_gib",
    } <= event.keys()
    assert event["drift/images"] > 0 and event["drift/lora_norm"] > 0
    assert {tensor.dtype for tensor in lora_of(folder).values()} == {torch.float32}


# What it leaves behind


def test_frozen_is_frozen_and_stock_diffusers_draws_the_same_pixels(config, tiny_model, monkeypatch):
    """The base is byte-equal after training; a fresh stock pipeline with the LoRA draws the validation images."""
    seen = {}
    monkeypatch.setattr("alignkit.run.load_base", lambda *args, **kw: seen.setdefault("base", load_base(*args, **kw)))
    export = alignprop.export

    def spy(run, validation, *args):
        export(run, validation, *args)
        seen.update(before=validation.base_images, after=validation.images, prompts=validation.prompts.prompts)

    monkeypatch.setattr(alignprop, "export", spy)
    cfg = config(lora=LoraConfig(rank=2, alpha=6), validation_steps=2)
    folder = train(cfg)

    fresh = load_base(tiny_model, random_init=True)
    for module in ("unet", "vae", "text_encoder"):
        trained = {
            name.replace(".base_layer", ""): parameter
            for name, parameter in getattr(seen["base"], module).named_parameters()
            if ".lora_" not in name
        }
        expected = dict(getattr(fresh, module).named_parameters())
        assert trained.keys() == expected.keys()
        for name, parameter in trained.items():
            assert parameter.grad is None and torch.equal(parameter, expected[name]), name

    pipe = fresh.pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return torch.cat(
            [
                torch.from_numpy(
                    pipe(
                        prompt,
                        num_inference_steps=cfg.num_inference_steps,
                        guidance_scale=cfg.guidance_scale,
                        generator=torch.Generator().manual_seed(i),
                        output_type="np",
                    ).images
                ).permute(0, 3, 1, 2)
                for i, prompt in enumerate(seen["prompts"])
            ]
        )

    torch.testing.assert_close(draw(), seen["before"], rtol=0, atol=1e-4)
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(draw(), seen["after"], rtol=0, atol=1e-4)
    assert (seen["after"] - seen["before"]).abs().max() > 1e-2


def test_the_folder_of_a_run(config, capsys):
    folder = train(config(validation_steps=2))
    said = capsys.readouterr().out
    for name in (LORA_WEIGHTS, "curves.png", "before_after.png"):
        assert (folder / name).is_file() and str(folder / name) in said
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "000000_base.png",
        "000001_validation.png",
        "000003_validation.png",
    ]
    with Image.open(folder / "before_after.png") as picture:
        assert picture.size == (4 * 128, 2 * 128)
    assert "alignprop" in (folder / "README.md").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["rewards"][0]["name"] == RED
    assert [event["step"] for event in scalars(folder)] == [0, 1, 2, 3]
    assert [event["step"] for event in scalars(folder) if "validation/loss" in event] == [1, 3]


# Reproducibility


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_accumulation_changes_nothing(config, batch, accumulation):
    """With noise of eta 1 and of DRaFT-LV's copies, which are a sample's own."""
    fields = {"plan": PlanConfig("draft_lv", {"copies": 1}), "eta": 1.0, "max_train_steps": 2, "learning_rate": 1e-3}
    one = train(config("one", **fields))
    two = train(config("two", train_batch_size=batch, gradient_accumulation_steps=accumulation, **fields))
    # AdamW's first steps are of the sign of a gradient, so a rounding error in one near 0 shows in full
    for name, tensor in lora_of(one).items():
        differing = (tensor - lora_of(two)[name]).abs() > 1e-5
        assert differing.float().mean() < 0.02, name
    ours, theirs = scalars(one)[0], scalars(two)[0]  # of the same weights
    for name in ("loss", "reward/Red", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_what_decoding_needs_is_computed_twice_instead_of_kept(config, monkeypatch):
    calls, forward = [], UNetMidBlock2D.forward  # the decoder's, and no block of the U-Net is one

    def counted(block, *args, **options):
        calls.append(block)
        return forward(block, *args, **options)

    monkeypatch.setattr(UNetMidBlock2D, "forward", counted)
    twice = train(config("twice", max_train_steps=2))
    of_twice = len(calls)
    calls.clear()
    monkeypatch.setattr(AutoencoderKL, "enable_gradient_checkpointing", lambda self: None)
    assert_same(twice, train(config("kept", max_train_steps=2)))
    updates = 2 * config().gradient_accumulation_steps
    assert of_twice == len(calls) + updates


def test_blocks_computed_twice_change_nothing(config, monkeypatch):
    calls, forward = [], ResnetBlock2D.forward

    def counted(block, *args, **options):
        calls.append(block)
        return forward(block, *args, **options)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    kept = train(config("kept", max_train_steps=2))
    of_kept = len(calls)
    calls.clear()
    assert_same(kept, train(config("twice", max_train_steps=2, gradient_checkpointing=True)))
    assert len(calls) > of_kept


def test_a_resumed_run_equals_an_uninterrupted_one(config):
    fields = {
        "checkpointing_steps": 2,
        "validation_steps": 1,
        "use_ema": True,
        "eta": 1.0,
        "lora": LoraConfig(dropout=0.2),
        "lr_scheduler": "cosine",
    }
    whole = train(config("whole", **fields))
    resumed = train(config("resumed", **fields, max_train_steps=4))
    for leftover in (resumed / "checkpoint-4").iterdir():
        leftover.unlink()
    (resumed / "checkpoint-4").rmdir()
    (resumed / LORA_WEIGHTS).unlink()
    train(config("resumed", **fields))
    assert_same(whole, resumed)
    assert reproducible(whole) == reproducible(resumed) and len(scalars(whole)) == 4


def test_validation_leaves_the_training_untouched(config):
    fields = {"eta": 1.0, "lora": LoraConfig(dropout=0.2)}
    assert_same(train(config("off", **fields)), train(config("on", **fields, validation_steps=1)))


def test_two_processes_equal_one(config, tmp_path):
    fields = {"max_train_steps": 3, "validation_steps": 3, "eta": 1.0}  # a K is drawn for each trajectory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: more would round differently
    one = train(config("one", **fields))
    torch.set_num_threads(threads)
    two = train_on_two_ranks("training/alignprop.py", config("two", **fields, gradient_accumulation_steps=1))
    assert_same(one, two, tolerance=1e-6)
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        for name in ("loss", "reward/Red", "diversity", "grad_norm", "k"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


# When to stop


def history(*validations: tuple[float, float, float]) -> list[dict]:
    """Of (reward, diversity, monitor)."""
    return [{"reward": r, "diversity": d, "monitors": {"monitor/Red": m}} for r, d, m in validations]


@pytest.mark.parametrize(
    ("validations", "message"),
    [
        ([(0, 1, 0), (1, 0.9, 1), (2, 0.8, 2)], None),
        ([(0, 1, 0), (1, 0.4, 1)], "diversity"),
        ([(0, 1, 0), (1, 1, 1), (2, 1, 0.4), (3, 1, 0.3)], "monitor/Red fell by 0.70"),
        ([(0, 1, 0), (1, 1, 1), (3, 1, 0.3)], None),  # once is no trend
        ([(0, 1, 0), (1, 1, 1), (2, 1, 0.4), (3, 1, 0.6)], None),  # it comes back
        ([(0, 1, 0), (2, 1, 1), (1, 1, 0.4), (1, 1, 0.3)], None),  # the reward falls, too: bad, but not exploited
    ],
)
def test_reason_to_stop(validations, message):
    reason = reason_to_stop(history(*validations), EarlyStopConfig(enabled=True))
    assert reason is None if message is None else message in reason
    assert reason_to_stop(history(*validations), EarlyStopConfig(enabled=False)) is None


def test_the_best_validation_is_that_of_the_monitors():
    validations = history((0, 1, 0), (1, 0.9, 2), (3, 0.4, 9), (2, 0.8, 2), (9, 1, 1))  # one lost its diversity
    cfg = EarlyStopConfig(enabled=True)
    assert best_of(validations, cfg) is validations[1]
    assert best_of(validations[:1], cfg) is None and best_of(validations, EarlyStopConfig()) is None
    without = [{**summary, "monitors": {}} for summary in validations]
    assert best_of(without, cfg) is without[4]


def test_images_without_a_score_do_not_count_for_a_monitor():
    nan = float("nan")
    start = monitor_scores({"monitor/face": torch.tensor([1.0, nan, 3.0]), "reward": torch.tensor([nan])})
    assert start == {"monitor/face": [2.0, 1.0]}
    assert gains({"monitor/face": torch.tensor([nan, 3.0, 4.0])}, start) == {"monitor/face": 1.5}
    with pytest.raises(FloatingPointError, match="monitor/face has no finite score of any validation image"):
        gains({"monitor/face": torch.tensor([nan, nan])}, start)


def test_an_early_stop_keeps_the_best_lora_also_after_a_resume(config, monkeypatch):
    """Monitors 0, 1, 3, 1, 1 while the reward rises: it ends after four steps with what it had after two."""

    def summary(self, measured):
        step = len(monitors) - len(script)
        return {"reward": float(step), "diversity": 1.0, "monitors": {"monitor/Red": script.pop(0)}}

    monkeypatch.setattr(Validation, "summary", summary)
    monitors = [0.0, 1.0, 3.0, 1.0, 1.0]
    fields = {"validation_steps": 1, "checkpointing_steps": 1, "early_stop": EarlyStopConfig(enabled=True)}
    script = list(monitors)
    two = train(config("two", max_train_steps=2, **fields))
    script = list(monitors)
    stopped = train(config("stopped", max_train_steps=9, **fields))
    assert not script
    assert_same(stopped, two)
    assert "the LoRA is that of step 2" in (stopped / "README.md").read_text()

    script = list(monitors)
    train(config("resumed", max_train_steps=3, **fields))
    script = [0.0, 1.0]  # the base's is measured anew
    assert_same(train(config("resumed", max_train_steps=9, **fields)), two)


def test_a_reward_that_wants_one_colour_is_stopped(config, monkeypatch):
    """Its pictures become alike; a run that allows half of that ends for it."""
    monkeypatch.setattr(Base, "decode", lambda self, latents: torch.sigmoid(latents[:, :3]))
    fields = {
        "rewards": [RewardConfig("tests.toy_rewards:Flat")],
        "max_train_steps": 20,
        "validation_steps": 5,
        "learning_rate": 5e-2,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    whole = train(config("whole", **fields))
    start, *_, end = load_json(whole / "checkpoint-20" / "state.json")["extra_state"]["validations"]
    assert end["reward"] > start["reward"] and end["diversity"] < start["diversity"]
    allowed = (start["diversity"] + end["diversity"]) / 2 / start["diversity"]
    stopped = train(config("stopped", **fields, early_stop=EarlyStopConfig(enabled=True, min_diversity=allowed)))
    *_, finish = read_events(stopped / "events.jsonl")
    assert finish["type"] == "finish" and "the diversity of the validation images fell" in finish["reason"]


def test_an_early_stop_still_exports(config, capsys):
    early_stop = EarlyStopConfig(enabled=True, min_diversity=100.0)  # which any diversity is below
    folder = train(config(validation_steps=2, early_stop=early_stop))
    assert len(scalars(folder)) == 2 and (folder / LORA_WEIGHTS).is_file()
    assert "stopped early after 2 steps: the diversity" in capsys.readouterr().out
    assert "stopped early" in (folder / "README.md").read_text()


def test_diversity_and_drift_by_hand(tiny_model):
    assert diversity(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(10 / 3)
    assert diversity(torch.zeros(1, 2)) == 0
    base = load_base(tiny_model, random_init=True)
    lora = add_lora(base.unet, 2, 6, ["to_q", "to_v"])
    for parameter in lora.values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    downs = [name for name in lora if ".lora_A." in name]
    updates = [3 * lora[name.replace("lora_A", "lora_B")] @ lora[name] for name in downs]
    expected = sum(update.square().sum() for update in updates).sqrt().item()
    assert lora_norm(lora, LoraConfig(rank=2, alpha=6)) == pytest.approx(expected, rel=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": []}, "rewards: expected at least one"),
        ({"rewards": [RewardConfig("alignment", args={"model": "emoji/monitor/clip"})]}, "is a judge of the monitor"),
        ({"prompt_file": ""}, "prompt_file: expected"),
        ({"plan": PlanConfig("draft_k", {"k": 5})}, "between 1 and num_inference_steps 4, got 5"),
        ({"plan": PlanConfig("draft_k", {"kk": 5})}, "plan.settings of draft_k.*kk"),
        ({"plan": PlanConfig("draft")}, "plan.name: expected one of alignprop"),
        ({"eta": 2.0}, "eta: expected 0 to 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected at least 1"),
        ({"validation_steps": 3, "logging_steps": 2}, "multiple of logging_steps"),
    ],
)
def test_bad_configs_are_refused_when_parsed(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_bad_prompts_are_refused_before_the_run_begins(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        train(config("a", prompt_file=str(tmp_path / "missing.txt")))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        train(config("b", prompt_file=str(tmp_path / "empty.txt")))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    (tmp_path / "long.txt").write_text(f"a cat\n{'x' * 60}\n")
    with pytest.raises(ValueError, match="Prompt too long.*reads 40 tokens, this one has 62.*xxx"):
        train(config("c", prompt_file=str(tmp_path / "long.txt")))
    lines = ['{"prompt": "a cat", "count": 1}', '{"prompt": "b", "count": null}', '{"prompt": "a dog", "count": 2}']
    (tmp_path / "null.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="count, prompt 2, 'b': expected a value of 'count'"):
        train(config("d", prompt_file=str(tmp_path / "null.jsonl"), rewards=[RewardConfig("count")]))
    (tmp_path / "latin.txt").write_bytes("un café".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
        train(config("e", prompt_file=str(tmp_path / "latin.txt")))


def test_a_judge_of_emoji_scenes_on_another_base_is_told(config):
    with pytest.warns(UserWarning, match="aesthetic scores by emoji/.*a judge of the emoji world's scenes"):
        train(config(max_train_steps=1, monitors=[RewardConfig("aesthetic", args={"clip": "emoji/monitor/clip"})]))


def test_a_reward_without_gradient_is_refused(config):
    with pytest.raises(ValueError, match="Detached: the score has no gradient"):
        train(config(rewards=[RewardConfig("tests.toy_rewards:Detached")]))


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    cfg = config(rewards=[RewardConfig("tests.toy_rewards:NaNFor", args={"prompt": "a bus"})])
    monkeypatch.setattr(alignprop, "probe", lambda *args, **kwargs: None)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d, samples \[\d\](.|\n)*NaNFor"):
        train(cfg)
    assert not (Path(cfg.output_dir) / LORA_WEIGHTS).exists()


def test_images_that_are_not_finite_stop_the_run(config, monkeypatch):
    generate = alignprop.generate

    def broken(*args):
        images = generate(*args)
        return torch.cat([images[:1], images[1:] * float("inf")])

    monkeypatch.setattr(alignprop, "generate", broken)
    with pytest.raises(FloatingPointError, match=r"not finite at step 0, samples \[1\] of \[0, 1\]"):
        train(config())


def test_a_base_whose_pictures_are_not_finite_is_refused_before_any_step(config, monkeypatch):
    monkeypatch.setattr(Base, "decode", lambda self, latents: torch.full((len(latents), 3, 8, 8), float("inf")))
    with pytest.raises(
        FloatingPointError, match=r"validation's images \[0, 1, 2, 3\] of 4 are not finite after 0 steps"
    ):
        train(config())


def test_gradients_of_the_size_of_adams_epsilon_are_reported(config):
    with pytest.warns(UserWarning, match="AdamW hardly moves"):
        train(config(rewards=[RewardConfig(RED, weight=1e-8)], max_train_steps=1))


def test_the_command_line_ends_in_one_line(config, tmp_path, capsys):
    cfg = config()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(cfg)))
    with pytest.raises(SystemExit) as stop:
        alignprop.main(["--config", str(path), "--prompt_file", "nowhere.txt"])
    assert str(stop.value).startswith("error: There is no prompt file nowhere.txt")
    with pytest.raises(SystemExit) as stop:
        alignprop.main(["--config", str(path), "--plan.nmae", "draft_k"])
    assert stop.value.code == 2 and "plan.name" in capsys.readouterr().err


# Configs


def test_dry_run_measures_and_writes_nothing(config, capsys):
    cfg = config(dry_run=True, validation_steps=2)
    with pytest.raises(SystemExit) as stop:
        train(cfg)
    assert stop.value.code in (0, None)
    out = capsys.readouterr().out
    assert "s a validation" in out and "s a step" in out and "memory" in out
    assert not Path(cfg.output_dir).exists()


CONFIGS = sorted((ROOT / "configs" / "alignprop").rglob("*.yaml"))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse(path):
    cfg = parse(Config, ["--config", str(path)])
    prompts = read_prompts(ROOT / cfg.prompt_file)
    assert len(prompts) > 0
    assert f"training/alignprop.py --config {path.relative_to(ROOT)}" in path.read_text()


DEEP = ("sdxl", "sd3", "flux")  # tests/test_families.py trains them with fewer layers


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if path.stem in DEEP else ()) for path in CONFIGS],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_configs_dry_run(path, tmp_path, monkeypatch, capsys):
    """On random weights; the judges of a model that is not bundled are replaced by one that needs no weights."""
    monkeypatch.chdir(ROOT)
    small = ["--dry_run", "true", "--random_init", "true", "--shrink", "40", "--resolution", "64"]
    small += ["--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--num_inference_steps", "4"]
    small += ["--num_validation_images", "2", "--output_dir", str(tmp_path / "run")]
    small += ["--plan.settings", "{}"] * ("refl" in path.stem)  # its stops are those of 40 steps
    cfg = parse(Config, ["--config", str(path), *small])
    if cfg.pretrained_model_name_or_path != "emoji":
        cfg = replace(cfg, rewards=[RewardConfig("compressibility")], monitors=[])
    elif not (WEIGHTS_DIR / "figures.json").exists():
        pytest.skip("the emoji world is not trained yet")
    with pytest.raises(SystemExit) as stop:
        train(cfg)
    assert stop.value.code in (0, None) and "s a step" in capsys.readouterr().out
