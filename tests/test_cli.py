import importlib.metadata
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit import artifacts, cli, concepts
from alignkit.base import add_lora, load_base
from alignkit.composed import Composed
from alignkit.controlnet import load_controlnet, new_controlnet, save_controlnet
from alignkit.families import Family
from alignkit.pictures import read_record, read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random base as a diffusers folder, with two LoRAs beside it."""
    folder = tmp_path_factory.mktemp("cli")
    load_base("sd15", random_init=True, shrink=40).pipeline().save_pretrained(folder / "model")
    for seed in (1, 2):
        base = load_base("sd15", random_init=True, shrink=40)
        parameters = add_lora(base.unet, rank=4, lora_alpha=4, target_modules=["to_q", "to_v"], seed=seed)
        for name, p in parameters.items():
            if ".lora_B." in name:
                p.data.normal_(generator=torch.Generator().manual_seed(seed))
        artifacts.save_lora(folder / f"lora{seed}", base.unet)
    return folder


def generate(model, *options, prompt="a cat"):
    """Runs the command; returns the images by seed."""
    folder = model / "out"
    size = ("--height", "32", "--width", "32", "--num_inference_steps", "2", "--device", "cpu")
    cli.main(
        ["generate", "--model", f"{model}/model", "--prompt", prompt, "--output_dir", str(folder), *size, *options]
    )
    images = {read_settings(path)["seed"]: np.asarray(Image.open(path)) for path in folder.glob("*.png")}
    for path in folder.iterdir():
        path.unlink()
    return images


def test_images_carry_the_settings_that_draw_them_again(model, tmp_path, capsys):
    loras = ["--lora", f"{model}/lora1=0.5", "--lora", f"{model}/lora2/pytorch_lora_weights.safetensors"]
    cli.main(
        ["generate", "--model", f"{model}/model", "--prompt", 'a "red" cat', "--negative_prompt", "a dog", *loras]
        + ["--seed", "7", "--num_images_per_prompt", "2", "--num_inference_steps", "2", "--guidance_scale", "3"]
        + ["--height", "32", "--width", "48", "--device", "cpu", "--output_dir", f"{tmp_path}/first"]
    )
    printed = capsys.readouterr().out.split()
    paths = sorted((tmp_path / "first").iterdir())
    assert printed == [str(path) for path in paths]
    assert [read_settings(path)["seed"] for path in paths] == [7, 8]
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (48, 32)
            record = json.loads(image.info["alignkit"])
        assert record["settings"]["prompt"] == 'a "red" cat' and record["settings"]["negative_prompt"] == "a dog"
        assert record["settings"]["lora"] == loras[1::2]
        digest = artifacts.sha256(model / "lora1/pytorch_lora_weights.safetensors")
        assert record["lora_sha256"][f"{model}/lora1=0.5"] == digest
        assert record["versions"]["torch"] == importlib.metadata.version("torch")
        (again,) = cli.generate(**read_settings(path), output_dir=str(tmp_path / "again"))
        assert again.name == path.name
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(again)))


def test_a_quantised_base_draws_with_a_lora(model):
    """Nearer to what the whole one draws with it than to what it draws without."""
    pytest.importorskip("torchao")
    lora = ("--lora", f"{model}/lora1=0.5")
    whole, rounded = (generate(model, *lora, *more)[0] for more in ((), ("--quantization", "int8")))
    plain = generate(model, "--quantization", "int8")[0]
    difference = np.abs(whole.astype(float) - rounded).mean()
    assert 0 < difference < np.abs(plain.astype(float) - rounded).mean()


def test_all_parts_are_in_the_picture_and_in_its_settings(model, tmp_path):
    pipe = load_base(f"{model}/model").pipeline()
    concepts.create("textual_inversion", pipe, "<n>", "cat").save(tmp_path / "concept")
    new_controlnet(pipe.unet, pipe.vae_scale_factor).save_pretrained(tmp_path / "controlnet")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "control.png")
    options = ["--lora", f"style={model}/lora1=0.5", "--concept", f"{tmp_path}/concept", "--alignit", "true"]
    options += ["--controlnet", f"{tmp_path}/controlnet", "--control_image", f"{tmp_path}/control.png"]
    options += ["--reward", "tests.toy_rewards:Red", "--best_of", "2", "--num_inference_steps", "1"]
    size = ["--height", "32", "--width", "32", "--device", "cpu", "--output_dir", f"{tmp_path}/first"]
    cli.main(["generate", "--model", f"{model}/model", "--prompt", "a <n>", *options, *size])
    (path,) = (tmp_path / "first").iterdir()
    record = read_record(path)
    assert record["chosen"]["seed"] in (0, 1) and record["sha256"].keys() >= {f"{tmp_path}/control.png"}
    assert f"{tmp_path}/concept/learned_embeds.safetensors" in record["sha256"]
    (again,) = cli.generate(**record["settings"], output_dir=str(tmp_path / "again"))
    assert again.read_bytes() == path.read_bytes() and again.name == path.name


def test_a_transparent_control_is_seen_on_white(model, tmp_path):
    pipe = load_base(f"{model}/model").pipeline()
    new_controlnet(pipe.unet, pipe.vae_scale_factor).save_pretrained(tmp_path / "controlnet")
    net = load_controlnet(f"{tmp_path}/controlnet", pipe.unet, pipe.vae_scale_factor)
    with torch.no_grad():  # a new one adds nothing, whatever it is shown
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    save_controlnet(tmp_path / "controlnet", net)
    clear = Image.new("RGBA", (32, 32), "red")
    clear.paste((0, 0, 0, 0), (0, 0, 16, 32))
    clear.save(tmp_path / "clear.png")
    white = Image.new("RGB", (32, 32), "red")
    white.paste("white", (0, 0, 16, 32))
    white.save(tmp_path / "white.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    drawn = {
        name: generate(model, "--controlnet", f"{tmp_path}/controlnet", "--control_image", f"{tmp_path}/{name}.png")[0]
        for name in ("clear", "white", "red")
    }
    assert np.array_equal(drawn["clear"], drawn["white"])
    assert not np.array_equal(drawn["clear"], drawn["red"])


def test_a_negative_prompt_that_nobody_reads(model, monkeypatch, tmp_path):
    """FLUX's: stock pipelines take it and drop it."""
    monkeypatch.setattr(Family, "classifier_free", property(lambda family: False))
    with pytest.raises(ValueError, match="reads no negative prompt, got 'a dog'"):
        cli.generate(model=f"{model}/model", prompt="a cat", negative_prompt="a dog", output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_refined_prompt_is_drawn_and_both_are_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr("alignkit.refine.build_refiner", lambda name: lambda prompt: f"{prompt} and a hat")
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "device": "cpu", "model": f"{model}/model"}
    (path,) = cli.generate("a cat", refine="some/model", output_dir=str(tmp_path / "first"), **size)
    record = read_record(path)
    assert (record["base_prompt"], record["refined_by"]) == ("a cat", "some/model")
    assert record["settings"]["prompt"] == "a cat and a hat" and "refine" not in record["settings"]
    (again,) = cli.generate(**record["settings"], output_dir=str(tmp_path / "again"))
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(again)))


def test_an_image_does_not_depend_on_how_many_were_asked_for(model):
    many = generate(model, "--seed", "3", "--num_images_per_prompt", "3")
    alone = generate(model, "--seed", "5")
    assert sorted(many) == [3, 4, 5] and np.array_equal(many[5], alone[5])
    assert not np.array_equal(many[3], many[4])


def test_offload_and_tiling(model, monkeypatch):
    """The parts stay on the CPU, and visit what --device says; here that is the CPU again."""
    done, offload = [], Composed.offload

    def to_the_cpu(composed, how, device):
        done.append((how, device, composed.pipe.vae.use_tiling, composed.pipe.unet.device.type))
        offload(composed, how, "cpu")

    plain = generate(model)[0]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(Composed, "offload", to_the_cpu)
    options = ["--offload", "model", "--vae_tiling", "true", "--device", "cuda"]
    assert np.array_equal(generate(model, *options)[0], plain)  # of one tile
    assert done == [("model", "cuda", True, "cpu")]


def test_a_mixture_draws_what_its_loras_draw_together(model, tmp_path):
    """To the 8 bits of a picture, give or take the rounding of another order of sums."""
    loras = ["--lora", f"{model}/lora1=0.1", "--lora", f"{model}/lora2=-0.05"]
    cli.main(["mix", *loras, "--model", f"{model}/model", "--output_dir", f"{tmp_path}/mixed"])
    together, mixed = (generate(model, *options)[0].astype(int) for options in (loras, ["--lora", f"{tmp_path}/mixed"]))
    assert np.abs(together - mixed).max() <= 1 and np.abs(together - generate(model)[0]).max() > 1


def test_convert(tmp_path):
    torch.save({"state_dict": {"weight": torch.arange(3.0)}}, tmp_path / "model.pt")
    cli.main(["convert", "checkpoint", "--source", f"{tmp_path}/model.pt", "--target", f"{tmp_path}/model.safetensors"])
    assert artifacts.load_tensors(tmp_path / "model.safetensors")["weight"].tolist() == [0, 1, 2]
    with pytest.raises(SystemExit, match="new .safetensors file"):
        cli.main(
            ["convert", "checkpoint", "--source", f"{tmp_path}/model.pt", "--target", f"{tmp_path}/model.safetensors"]
        )


def test_lora_weights(model):
    plain, lora = generate(model)[0], generate(model, "--lora", f"{model}/lora1")[0]
    assert not np.array_equal(plain, lora)
    assert np.array_equal(lora, generate(model, "--lora", f"{model}/lora1=1")[0])
    assert np.array_equal(plain, generate(model, "--lora", f"{model}/lora1=0")[0])
    both = ("--lora", f"{model}/lora1", "--lora", f"{model}/lora2=0")
    assert np.array_equal(lora, generate(model, *both)[0])


def test_equals_sign_in_a_path(tmp_path):
    assert cli._split_weight("runs/a=0.5") == (tmp_path.__class__("runs/a"), 0.5)
    assert cli._split_weight("runs/lr=small") == (tmp_path.__class__("runs/lr=small"), 1.0)
    (tmp_path / "lr=0.1").mkdir()
    assert cli._split_weight(f"{tmp_path}/lr=0.1") == (tmp_path / "lr=0.1", 1.0)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["generate"], 2, "prompt"),
        (["generate", "--prompt", "a", "--sed", "1"], 2, "--sed"),
        (["generate", "--prompt", "a", "--seed", "one"], 2, "seed"),
        (["generate", "--prompt", "a", "--model", "nowhere"], "No base model 'nowhere'", ""),
        (["generate", "--prompt", "a", "--num_images_per_prompt", "0"], "at least 1, got 25 and 0", ""),
        (
            ["generate", "--prompt", "a", "--model", "nowhere", "--device", "cpu", "--offload", "model"],
            "offload needs a GPU",
            "",
        ),
        (["generate", "--prompt", "a", "--offload", "disk"], 2, "offload"),
        (["nothing"], 2, "nothing"),
    ],
)
def test_wrong_input_is_one_clear_error(argv, code, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    # An exit with a string prints it and gives the shell a 1.
    assert error.value.code == code or code in error.value.code
    assert message in capsys.readouterr().err


def test_a_lora_that_does_not_fit_is_refused(model):
    with pytest.raises(SystemExit, match="does not exist"):
        generate(model, "--lora", f"{model}/lora3")
    with pytest.raises(SystemExit, match="is a pickle by its name"):
        generate(model, "--lora", f"{model}/lora.ckpt")


def test_a_png_of_somebody_else(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="carries no settings"):
        read_settings(tmp_path / "a.png")


def test_commands_can_be_registered_and_grouped(monkeypatch):
    seen = []

    def check(folder: str, strict: bool = False, column: Sequence[str] = ()) -> None:
        """Check a folder.

        Args:
            folder: Which.
            strict: Whether.
            column: A name.
        """
        seen.append((folder, strict, list(column)))

    monkeypatch.setitem(cli.COMMANDS, "data", {"check": check})
    cli.main(["data", "check", "a", "--column", "x", "--column", "y"])
    cli.main(["data", "check", "b", "--strict", "true"])
    assert seen == [("a", False, ["x", "y"]), ("b", True, [])]


def doctor(
    monkeypatch, capsys, installed, requires=("torch>=2.13,<2.15", "peft>=0.19", "tensorboard>=2; extra == 'a'")
):
    """The doctor's exit code and words on a machine where `installed` is all there is."""

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requires))
    monkeypatch.setattr(cli, "_check_world", lambda: [])
    monkeypatch.setattr(cli, "_pip_check", lambda: [])
    try:
        cli.main(["doctor"])
        code = 0
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().out


def test_doctor_is_content(monkeypatch, capsys):
    code, out = doctor(monkeypatch, capsys, {"torch": "2.14.1+cpu", "torchvision": "0.29.1", "peft": "0.21.2"})
    assert code == 0 and "No problems found" in out
    assert "2.14.1+cpu" in out and "CPU" in out and "disk" in out
    assert "tensorboard        not installed" in out


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({"torch": "2.14.1"}, "peft is missing: pip install 'peft>=0.19'"),
        ({"torch": "2.15.0", "peft": "0.20"}, "torch 2.15.0 is outside the tested range"),
        (
            {"torch": "2.14.1", "peft": "0.20", "torchvision": "0.28.0"},
            "torchvision 0.28.0 was not built for torch 2.14.1",
        ),
        (
            {"torch": "2.14.1", "peft": "0.20", "image-reward": "1.5", "transformers": "5.23.0"},
            "image-reward beside transformers 5.23.0",
        ),
    ],
)
def test_doctor_finds(installed, problem, monkeypatch, capsys):
    code, out = doctor(monkeypatch, capsys, installed)
    assert code == 1 and out.count("problem:") == 1 and problem in out
