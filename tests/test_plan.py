"""alignkit/plan.py: what it predicts on the meta device against what the same training holds on the CPU."""

import contextlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignkit import cli, config, plan
from alignkit.base import load_base
from alignkit.conditions import ConditionConfig, build_condition
from alignkit.config import parse
from alignkit.optimizers import PACKAGES
from alignkit.rewards import RewardConfig, build_reward
from tests import two_ledgers
from tests.benchmarks import gpu_check, real_size
from tests.test_families import thin
from tests.tiny import save_tiny_model
from tests.torchrun import torchrun
from tests.toy import toy_config
from training import alignprop, controlnetpp, customize, ddpo, neti

MIB = 2**20
TRAINERS = (alignprop, ddpo, controlnetpp, neti, customize)


def test_a_ledger_counts_storages_once_and_until_they_die():
    with plan.Ledger("cpu") as ledger:
        a = torch.zeros(256, 1024)  # 1 MiB
        views = [a[1:], a.T, a.view(-1)]
        assert ledger.live == MIB
        b = a + 1
        assert ledger.live == 2 * MIB
        del a
        assert ledger.live == 2 * MIB
        del views
        assert ledger.live == MIB
        del b
    assert ledger.live == 0 and ledger.phases["setup"].peak == 2 * MIB


def test_what_was_there_before_is_not_counted():
    before = torch.zeros(256, 1024)
    with plan.Ledger("cpu") as ledger:
        before.add_(1)
        assert ledger.live == 0
    del before
    assert ledger.live == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_peak_of_a_chain_with_and_without_checkpoints(device, checkpointed):
    """n squares keep n inputs; in n / k checkpoints of k, the inputs of those, and k at a time."""
    blocks, squares = 8, 4

    def block(x):
        for _ in range(squares):
            x = x.square()
        return x

    x = torch.zeros(256, 1024, device=device, requires_grad=True)
    with plan.Ledger(device) as ledger:
        y = x
        for _ in range(blocks):
            y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
        held = ledger.live / MIB
        y.sum().backward()
    # the first input is x, which was there before; the last output is y
    assert held == (blocks if checkpointed else blocks * squares)
    highest = ledger.phases["setup"].peak / MIB
    assert held < highest <= held + (squares + 4 if checkpointed else 4)


def test_flops_of_a_product_and_its_gradients():
    """2 m n k for the product, and as much for each of its two gradients."""
    a = torch.zeros(3, 5, requires_grad=True)
    b = torch.zeros(5, 7, requires_grad=True)
    with plan.Ledger("cpu") as ledger:
        (a @ b).sum().backward()
    assert ledger.phases["setup"].flops == [3 * 2 * 3 * 5 * 7]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_attention_holds_no_scores(device):
    """4 S^2 D FLOPs and no S^2 numbers, alike on both devices."""
    batch, heads, length, width = 1, 2, 512, 8
    shape = (batch, heads, length, width)
    with plan.Ledger(device) as ledger, plan.NoNumbers():
        query, key, value = (torch.zeros(shape, device=device) for _ in range(3))
        nn.functional.scaled_dot_product_attention(query, key, value)
    assert ledger.phases["setup"].flops == [4 * batch * heads * length**2 * width]
    assert ledger.phases["setup"].peak < 4 * heads * length**2


def test_without_numbers_every_check_passes():
    with plan.NoNumbers():
        x = torch.zeros(2, 3, device="meta")
        low, high = x.aminmax()
        assert low.isfinite() and not low < 0 and not high > 1
        assert x.any() and float(x.mean()) == 1 and x.cpu().tolist() == [[1.0] * 3] * 2
        assert (~x.isfinite()).nonzero().tolist() == []
        assert torch.equal(x, x + 1)  # else Canny's hysteresis would never end


def test_autocast_within_autocast():
    x = torch.zeros(2, 4, device="meta")
    with plan.NoNumbers(), torch.autocast("meta", torch.bfloat16):
        with torch.autocast("meta", enabled=False):
            assert nn.functional.linear(x, x).dtype == torch.float32
        assert nn.functional.linear(x, x).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_autocast_holds_and_computes_in_half_precision(device, checkpointed):
    """Of two layers: what the gradient needs, in bfloat16, and nothing of it where that is computed again."""
    x, first, second = torch.zeros(4, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 16, bias=False)
    with plan.Ledger(device) as ledger, plan.NoNumbers():
        x, first, second = x.to(device), first.to(device), second.to(device)
        before = ledger.live

        def layers(x):
            return second(first(x))

        with torch.autocast(device, torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False) if checkpointed else layers(x)
        assert y.dtype == torch.bfloat16
        output = 2 * 4 * 16
        kept = 2 * (4 * 64 + 4 * 32 + 32 * 16)  # not the first weights, since x has no gradient
        assert ledger.live - before == (output if checkpointed else output + kept)
        y.sum().backward()
    assert {p.grad.dtype for p in (first.weight, second.weight)} == {torch.float32}
    if not checkpointed:  # how much is computed again is PyTorch's to say
        assert sum(ledger.phases["setup"].flops) == 3 * 2 * 4 * (64 * 32 + 32 * 16) - 2 * 4 * 64 * 32


@pytest.fixture
def build(tmp_path):
    """Makes the config of a trainer for two steps of the tiny model."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    images = tmp_path / "images"
    images.mkdir()
    for name in ("one", "two"):
        Image.effect_noise((16, 16), 64).convert("RGB").save(images / f"{name}.png")
    (images / "metadata.jsonl").write_text(
        '{"image": "one.png", "text": "a cat"}\n{"image": "two.png", "text": "a dog"}\n'
    )
    tuning = {
        "prompt_file": str(tmp_path / "prompts.txt"),
        "rewards": [RewardConfig("compressibility")],
        "num_validation_images": 2,
    }
    own = {
        alignprop: tuning,
        ddpo: tuning,
        controlnetpp: {
            "train_data_dir": str(images),
            "condition": ConditionConfig("lineart"),
            "reward_weight": 0.5,
            "reward_timesteps": [0, 999],
            "num_validation_images": 2,
            "gradient_checkpointing": True,
        },
        neti: {
            "train_data_dir": str(images),
            "super_category_token": "a",
            "mapper": neti.MapperConfig(hidden_size=8, num_frequencies=16),
            "validation_prompts": ["a {}"],
            "validation_seeds": [1],
        },
        customize: {"instance_data_dir": str(images), "class_noun": "a", "num_validation_images": 2},
    }
    model = save_tiny_model(tmp_path / "model")

    def build(trainer, **fields):
        defaults = {
            "pretrained_model_name_or_path": model,
            "random_init": True,
            "num_inference_steps": 2,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "use_ema": True,
            "dry_run": True,
            "report_to": "none",
        }
        return trainer.Config(output_dir=str(tmp_path / "run"), **{**defaults, **own[trainer], **fields})

    return build


def compare(build, trainer, accumulated=1, **fields) -> None:
    with plan.Ledger("cpu") as real, pytest.raises(SystemExit):
        trainer.train(build(trainer, **fields))
    predicted = plan.estimate(trainer.train, build(trainer, estimate="cpu", **fields))
    assert predicted.phases.keys() == real.phases.keys() == {"setup", "train", "validate"}
    for name in ("train", "validate"):
        assert predicted.phases[name].peak == pytest.approx(real.phases[name].peak, rel=0.1), name
        # NeTI's validation encodes a prompt once for each of its timesteps, which all are one without numbers
        if (trainer, name) != (neti, "validate"):
            passes = accumulated if name == "train" else 1
            assert [passes * flops for flops in predicted.phases[name].flops] == real.phases[name].flops, name


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_prediction_equals_the_run(build, capsys, trainer):
    compare(build, trainer)
    report = capsys.readouterr().out
    assert "on cpu (checked" in report and "peak of training" in report


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "prodigy", "adafactor", "diffgrad"])
def test_prediction_equals_the_run_with_other_optimizers(build, capsys, optimizer):
    pytest.importorskip(PACKAGES[optimizer])
    compare(build, customize, optimizer=optimizer, method="dreambooth", use_ema=False)
    assert "peak of training" in capsys.readouterr().out


def test_prediction_equals_the_run_with_accumulation_and_encoders_on_the_cpu(build):
    """A micro-batch stands for all of an update, whose FLOPs the report multiplies."""
    fields = {"gradient_accumulation_steps": 2, "offload_text_encoders": True}
    compare(build, alignprop, accumulated=2, **fields)


def test_peak_of_two_processes(tmp_path):
    fields = {"max_train_steps": 2, "checkpointing_steps": 2, "train_batch_size": 1}
    alone = two_ledgers.bytes_held(toy_config(tmp_path / "one", **fields, gradient_accumulation_steps=4))
    config.save(toy_config(tmp_path / "two", **fields), tmp_path / "two.yaml")
    done = torchrun("-m", "tests.two_ledgers", "--config", str(tmp_path / "two.yaml"))
    peaks = [int(found) for found in re.findall(r"peak (\d+)", done.stdout)]
    assert len(peaks) == 2, done.stderr[-3000:]
    predicted = plan.peak_of_several(**alone)
    assert max(peaks) == pytest.approx(predicted, rel=0.1)
    assert predicted > alone["peak"]


def test_prediction_equals_the_run_under_autocast(build):
    compare(build, controlnetpp, mixed_precision="bf16")


def test_prediction_equals_the_run_with_canny(build):
    compare(build, controlnetpp, condition=ConditionConfig("canny"))


def test_prediction_equals_the_run_beside_a_transformer(build, tmp_path):
    folder = thin("flux", tmp_path / "flux")
    compare(build, controlnetpp, pretrained_model_name_or_path=folder, shrink=40, resolution=32)


def test_prediction_equals_the_run_on_the_emoji_model(build):
    fields = {"num_inference_steps": 1, "train_batch_size": 1, "num_validation_images": 1}
    compare(build, alignprop, pretrained_model_name_or_path="emoji", **fields)


def test_the_configs_judges_need_no_weights():
    """PickScore, a CLIP of ViT-H/14, OpenAI's of ViT-L/14, DPT-Hybrid and UPerNet, of their published sizes."""
    with plan.Ledger("meta"), plan.NoNumbers():
        depth = build_condition("depth", model="Intel/dpt-hybrid-midas").to("meta")
        segmentation = build_condition("segmentation", model="openmmlab/upernet-convnext-small").to("meta")
        pickscore = build_reward("pickscore")
        clip = build_reward("alignment", model="openai/clip-vit-large-patch14").to("meta")
        images = torch.zeros(1, 3, 64, 64, device="meta", requires_grad=True)
        clip(images, ["a cat"]).sum().backward()
        controls = [condition.predict(images) for condition in (depth, segmentation)]
    assert images.grad.shape == images.shape
    assert [list(control.shape) for control in controls] == [[1, 64, 64], [1, 150, 64, 64]]
    judges = (pickscore, clip, depth, segmentation)
    sizes = [sum(p.numel() for p in judge.parameters()) for judge in judges]
    assert sizes == [986_109_441, 427_616_513, 122_377_985, 81_877_196]


@pytest.mark.parametrize("trainer", [controlnetpp, neti, customize], ids=lambda trainer: trainer.__name__)
def test_pictures_of_the_emoji_world_stand_in_for_a_folder_that_is_not_there(build, trainer, tmp_path, capsys):
    """What is held and computed is of the config's resolution, not of the images' own."""
    name = "instance_data_dir" if trainer is customize else "train_data_dir"
    fields = {"estimate": "cpu"} | ({"with_prior_preservation": False} if trainer is customize else {})
    with pytest.warns() if trainer is customize else contextlib.nullcontext():
        without = plan.estimate(trainer.train, build(trainer, **fields, **{name: str(tmp_path / "none")}))
    assert f"There is no {tmp_path / 'none'}" in capsys.readouterr().out or trainer is customize
    there = plan.estimate(trainer.train, build(trainer, **fields))
    assert without.phases["train"].peak == pytest.approx(there.phases["train"].peak, rel=0.1)
    assert without.phases["train"].flops == there.phases["train"].flops


def test_a_judge_that_is_not_to_be_had_is_a_sentence(build, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rewards = [RewardConfig("alignment", args={"model": "nobody/nothing"})]
    with pytest.raises(FileNotFoundError, match="alignment: .* name another one on the command line"):
        plan.estimate(alignprop.train, build(alignprop, estimate="cuda", rewards=rewards))


def test_what_is_said_of_cuda_is_unverified_and_counts_no_encoders_on_the_cpu(build, capsys, monkeypatch):
    monkeypatch.setattr(plan, "GIB", 1)
    cfg = build(alignprop, estimate="cuda", offload_text_encoders=True)
    ledger = plan.estimate(alignprop.train, cfg)
    report = capsys.readouterr().out
    assert "on cuda (UNVERIFIED" in report
    encoder = load_base(cfg.pretrained_model_name_or_path, random_init=True).text_encoder
    peak = float(re.search(r"peak of training +([\d.]+)", report)[1])
    assert peak == ledger.phases["train"].peak - sum(p.nbytes for p in encoder.parameters())


def test_command_starts_the_trainer_of_the_configs_folder(monkeypatch):
    lines = []

    class Done:
        returncode = 0

    monkeypatch.setattr("subprocess.run", lambda line, **_: lines.append(line) or Done)
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--config", "configs/alignprop/sd15.yaml", "--device", "cpu", "--lora.rank", "8", "--x=-1"])
    assert end.value.code == 0
    config = ["--config", "configs/alignprop/sd15.yaml"]
    assert lines == [
        [sys.executable, "training/alignprop.py", *config, "--estimate", "cpu", "--lora.rank", "8", "--x=-1"]
    ]


def test_command_without_a_trainer():
    with pytest.raises(SystemExit, match="no trainer training/none.py"):
        cli.main(["plan", "--config", "configs/none/sd15.yaml"])


def test_gradients_of_the_gpu_check_have_an_error_of_zero_on_the_cpu_itself(monkeypatch):
    monkeypatch.setattr(gpu_check, "PRECISIONS", (torch.float32,))
    (line,) = gpu_check.compare("cpu")
    assert line == "torch.float32: relative error 0.00e+00, cosine 1.000000, finite True"


@pytest.mark.parametrize("name", gpu_check.TRAININGS)
def test_trainings_of_the_gpu_check_are_configs(name, monkeypatch):
    monkeypatch.chdir(gpu_check.ROOT)
    script, *options = gpu_check.TRAININGS[name]
    assert script == "training/alignprop.py"
    cfg = parse(alignprop.Config, options)
    assert cfg.dry_run and (cfg.estimate == "cuda") == ("predicted" in name)


def test_the_gpu_check_goes_on_after_a_failure(capsys, monkeypatch):
    """With a GPU that is made up; the commands are real, and as short as commands can be."""
    gpu = SimpleNamespace(name="none", total_memory=2**30, major=1, minor=2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpu)
    assert {*gpu_check.TRAININGS, "two GPUs"} < gpu_check.checks().keys()
    commands = ["raise ValueError('no room')", "print('config'); print('dry run: 1 s'); print('end')", "print('a\\nb')"]
    checks = {str(i): lambda code=code: gpu_check.run(["-c", code]) for i, code in enumerate(commands)}
    monkeypatch.setattr(gpu_check, "checks", lambda: checks)
    gpu_check.main()
    first, *said = capsys.readouterr().out.strip().split("\n\n")
    assert "2 x none, 1.0 GiB, compute 1.2" in first
    assert said[0].startswith("0:\nfailed: ") and said[0].endswith("ValueError: no room")
    assert said[1:] == ["1:\ndry run: 1 s\nend", "2:\nb"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_is_a_sentence(capsys):
    gpu_check.main()
    assert capsys.readouterr().out == "gpu-check: torch sees no CUDA GPU here, so there is nothing to check.\n"


@pytest.mark.slow
def test_real_size_fits_into_20_gb():
    results = real_size.main([])
    assert results.keys() == set(real_size.PARTS)
    assert all(gib < 20e9 / 2**30 for _, gib in results.values())
