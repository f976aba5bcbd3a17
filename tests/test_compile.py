"""`torch_compile`: every trainer leaves the same artifact with it as without, under the same names."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from alignkit.base import add_lora
from alignkit.conditions import ConditionConfig
from alignkit.config import LoraConfig
from alignkit.noise import NoiseSchedule
from alignkit.rewards import RewardConfig
from alignkit.run import Run
from alignkit.sampling import GradientPlan, sample
from tests.runs import assert_close, assert_same, reproducible
from tests.test_controls import write_folder
from tests.tiny import ddim, save_tiny_model, tiny_unet
from tests.toy import toy_config
from training import alignprop, controlnetpp, customize, ddpo, neti

LORA = LoraConfig(rank=2)
TRAINERS: dict[str, tuple[ModuleType, dict]] = {
    "alignprop": (alignprop, {"plan": alignprop.PlanConfig("draft_lv", {"copies": 1}), "eta": 1.0}),
    "ddpo": (ddpo, {"updates_per_round": 1, "per_prompt_min_count": 2, "num_images_per_prompt": 2}),
    "controlnetpp": (controlnetpp, {"reward_weight": 0.5, "reward_timesteps": [0, 999]}),
    "controlnetpp_checkpointing": (controlnetpp, {"gradient_checkpointing": True}),
    "neti": (neti, {}),
    "neti_checkpointing": (neti, {"gradient_checkpointing": True}),
    "lora": (customize, {"method": "lora", "lora": LORA}),
    "custom_diffusion": (customize, {"method": "custom_diffusion"}),
    "dreambooth": (customize, {"method": "dreambooth"}),
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def config_of(trainer: ModuleType, tiny_model: str, folder: Path, **fields):
    """Two updates of two images."""
    fields |= {
        "pretrained_model_name_or_path": tiny_model,
        "random_init": True,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # else a rounding error in a gradient near 0 shows in full
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "validation_steps": 2,
        "report_to": "none",
    }
    images = folder / "images"
    if trainer in (alignprop, ddpo):
        prompts = folder / "prompts.txt"
        prompts.write_text("a cat\na dog\n")
        fields |= {"prompt_file": str(prompts), "rewards": [RewardConfig("tests.toy_rewards:Red")], "lora": LORA}
        fields |= {"num_validation_images": 2}
    elif trainer is controlnetpp:
        if not images.exists():
            write_folder(images, number=4, size=(16, 16))
        fields |= {"train_data_dir": str(images), "condition": ConditionConfig("tests.toy_conditions:Red")}
        fields |= {"num_validation_images": 2}
    else:
        images.mkdir(exist_ok=True)
        for i, color in enumerate(("red", "blue", "green")):
            Image.new("RGB", (32, 32), color).save(images / f"{i}.png")
        fields |= {"validation_prompts": ["a {}"]}
        if trainer is neti:
            fields |= {"train_data_dir": str(images), "super_category_token": "cat", "validation_seeds": [0]}
            fields |= {"mapper": neti.MapperConfig(hidden_size=4, num_frequencies=8)}
        else:
            fields |= {"instance_data_dir": str(images), "class_noun": "cat", "num_class_images": 2}
            fields |= {"num_validation_images": 2}
    return trainer.Config(**fields)


def test_a_lora_has_the_same_gradient_through_the_sampler(tmp_path):
    """Two checkpointed steps behind one without a graph; and the same names."""
    run = Run(toy_config(tmp_path / "run", torch_compile="eager"))
    schedule, text = NoiseSchedule.from_scheduler(ddim()), torch.randn(1, 5, 16, generator=torch.Generator())
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator())

    def gradient(compiled: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        unet = tiny_unet().requires_grad_(False)
        if compiled:
            run.speed_up(unet)
        lora = add_lora(unet, 2, 2, ["to_k", "to_v"])
        x_0 = sample(
            lambda x_t, t: unet(x_t, t, text).sample, x_T, schedule, schedule.timesteps(3), GradientPlan(3, (1, 2))
        )
        gradients = torch.autograd.grad(x_0.square().sum(), list(lora.values()))
        return dict(zip(lora, gradients, strict=True))

    plain = gradient(False)
    torch._dynamo.reset()
    counters.clear()
    assert_close(plain, gradient(True), tolerance=1e-4)
    assert counters["stats"]["unique_graphs"] > 0


def test_a_network_whose_hooks_come_and_go_is_compiled_by_blocks(tmp_path):
    unet = tiny_unet()
    Run(toy_config(tmp_path / "run", torch_compile="eager")).speed_up(unet, hooked=True)
    compiled = {type(m).__name__ for m in unet.modules() if m._compiled_call_impl is not None}
    assert compiled == {"BasicTransformerBlock"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_artifact_as_without(tiny_model, tmp_path, name):
    trainer, fields = TRAINERS[name]
    config = {"trainer": trainer, "tiny_model": tiny_model, "folder": tmp_path} | fields
    plain = trainer.train(config_of(**config, output_dir=str(tmp_path / "plain")))
    torch._dynamo.reset()
    counters.clear()
    compiled = trainer.train(config_of(**config, output_dir=str(tmp_path / "compiled"), torch_compile="aot_eager"))
    assert counters["stats"]["unique_graphs"] > 0
    assert_same(plain, compiled, tolerance=1e-5)
    for ours, theirs in zip(reproducible(plain), reproducible(compiled), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"type"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    if name == "alignprop":  # not the graph of the base without its LoRA
        assert reproducible(compiled)[-1]["drift/images"] > 0
