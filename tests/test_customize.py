"""training/customize.py and alignkit/customized.py on a model of a few thousand parameters, up to stock pipelines."""

import re
import subprocess
import sys
import types
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image

from alignkit.artifacts import save_lora
from alignkit.base import load_base
from alignkit.config import LoraConfig
from alignkit.customized import (
    CUSTOM_DIFFUSION_WEIGHTS,
    EMBEDDINGS,
    cross_attention,
    fingerprint,
    load,
    load_custom_diffusion,
    read_concept,
    save_concept,
    save_custom_diffusion,
    save_embeddings,
)
from alignkit.run import Run
from tests.runs import assert_close, assert_same, scalars, tensors_of
from tests.test_families import thin
from tests.tiny import save_tiny_model, tiny_sdxl
from tests.torchrun import train_on_two_ranks
from training import customize
from training.customize import Config, train

ROOT = Path(__file__).parent.parent
METHODS = ("lora", "custom_diffusion", "dreambooth")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, color in enumerate(["red", "blue", "green"]):
        picture = Image.new("RGB", (16, 16), color)
        picture.paste("white", (0, 0, 4 + i, 8))  # so that a mirrored one is another
        picture.save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(tiny_model, images, tmp_path):
    def make(name: str = "run", **fields) -> Config:
        defaults = {
            "pretrained_model_name_or_path": tiny_model,
            "random_init": True,
            "instance_data_dir": str(images),
            "class_noun": "dog",
            "templates": ["a {}", "one {small} {}"],
            "validation_prompts": ["a {}"],
            "num_class_images": 3,
            "num_inference_steps": 2,
            "num_validation_images": 2,
            "lora": LoraConfig(rank=2),
            "max_train_steps": 3,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "validation_steps": 0,
            "checkpointing_steps": 100,
            "report_to": "none",
        }
        return Config(output_dir=str(tmp_path / name), **{**defaults, **fields})

    return make


@pytest.mark.parametrize("method", METHODS)
def test_learns(config, method):
    """The mean of the last losses is below that of the first, on one image without a prior."""
    folder = train(
        config(method=method, with_prior_preservation=False, max_train_steps=30, train_batch_size=8, learning_rate=3e-2)
    )
    losses = [event["loss"] for event in scalars(folder)]
    assert sum(losses[-8:]) < sum(losses[:8]), losses


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_an_uninterrupted_one(config, method):
    whole = train(config("whole", method=method, max_train_steps=4))
    short = train(config("part", method=method, max_train_steps=2, checkpointing_steps=2))
    for file in short.glob("*.safetensors"):
        file.unlink()
    part = train(config("part", method=method, max_train_steps=4))
    assert_same(whole, part)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_does_not_matter(config, method):
    # with Adam's own epsilon, the signs of gradients that are all rounding would move weights
    one = train(config("one", method=method, adam_epsilon=1e-3, train_batch_size=4))
    two = train(config("two", method=method, adam_epsilon=1e-3, train_batch_size=1, gradient_accumulation_steps=4))
    assert_same(one, two, tolerance=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_bit(config, method):
    kept = train(config("kept", method=method))
    assert_same(kept, train(config("twice", method=method, gradient_checkpointing=True)))


def test_the_prior_takes_part(config):
    """One update: the loss is the sum, weighted, and the gradient is not that of the instances alone."""
    runs = {weight: train(config(f"{weight}", max_train_steps=1, prior_loss_weight=weight)) for weight in (0.5, 1.0)}
    without = train(config("without", max_train_steps=1, with_prior_preservation=False))
    (half,), (whole,), (alone,) = map(scalars, (runs[0.5], runs[1.0], without))
    for weight, event in ((0.5, half), (1.0, whole)):
        assert event["prior_loss"] > 0 and event["instance_loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert event["loss"] == pytest.approx(event["instance_loss"] + weight * event["prior_loss"], rel=1e-6)
    norms = [event["grad_norm"] for event in (alone, half, whole)]
    assert len({round(norm, 6) for norm in norms}) == 3


def test_two_processes_equal_one(config):
    """Custom Diffusion, which trains weights and a token; both processes read the class images that one drew."""
    fields = {"method": "custom_diffusion", "adam_epsilon": 1e-3, "num_class_images": 3}
    one = train(config("one", **fields, train_batch_size=4))
    two = train_on_two_ranks("training/customize.py", config("two", **fields, train_batch_size=2))
    assert_same(one, two, tolerance=1e-4)
    for ours, theirs in zip(scalars(one), scalars(two), strict=True):
        for name in ("instance_loss", "prior_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_trained_changes(config, method, monkeypatch):
    bases = []
    monkeypatch.setattr("alignkit.run.load_base", lambda *a, **k: bases.append(load_base(*a, **k)) or bases[-1])
    cfg = config(method=method)
    train(cfg)
    base, fresh = bases[0], load_base(cfg.pretrained_model_name_or_path, random_init=True)
    for part in ("vae", "text_encoder"):
        assert_close(getattr(fresh, part).state_dict(), getattr(base, part).state_dict())
    trained = dict(base.unet.named_parameters())
    changed = {n for n, p in fresh.unet.named_parameters() if n in trained and not torch.equal(p, trained[n])}
    expected = {
        "lora": set(),
        "custom_diffusion": {f"{n}.{p}.weight" for n in cross_attention(fresh.unet) for p in ("to_k", "to_v")},
        "dreambooth": set(dict(fresh.unet.named_parameters())),
    }[method]
    assert changed == expected


@pytest.mark.parametrize("method", METHODS)
def test_stock_diffusers_draws_what_training_drew(config, method, monkeypatch):
    """The validation pictures of the run, from the files alone, by a stock pipeline."""
    drawn = []
    draw = customize.draw
    monkeypatch.setattr(customize, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    cfg = config(method=method)
    folder = train(cfg)
    pipe = load_base(cfg.pretrained_model_name_or_path, random_init=True).pipeline()
    if method == "lora":
        pipe.load_lora_weights(folder)
    elif method == "custom_diffusion":
        pipe.unet.load_attn_procs(folder, weight_name=CUSTOM_DIFFUSION_WEIGHTS, _pipeline=pipe)
        pipe.load_textual_inversion(folder, weight_name=EMBEDDINGS)
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    settings = {"num_inference_steps": 2, "guidance_scale": cfg.guidance_scale, "output_type": "pt"}
    images = pipe(["a <thing> dog"] * 2, generator=generators, **settings).images
    before, after = drawn[0], drawn[-1]
    torch.testing.assert_close(images, after, rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_start_token_keeps_its_gradient(tiny_model, images, config):
    """Custom Diffusion's detach: a text whose start row alone is not zero moves neither W_k nor W_v."""
    base = load_base(tiny_model, random_init=True)
    cfg = config(method="custom_diffusion")
    params = customize.trained_parameters(cfg, base, customize.Text(base, cfg))
    text = torch.zeros(1, 5, 16)
    text[:, 0] = 1
    x_t = torch.randn(1, 4, 8, 8)
    base.unet(x_t, 5, text).sample.square().sum().backward()
    assert all(p.grad.abs().sum() == 0 for n, p in params.items() if n != customize.TOKEN)
    text[:, 1] = 1
    base.unet(x_t, 5, text).sample.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in params.items() if "to_v" in n)


def test_token_row_equals_a_real_token(config, tiny_model):
    """The hook gives what a resized table with the row in it gives, and leaves nothing behind."""
    cfg, base = config(method="custom_diffusion"), load_base(tiny_model, random_init=True)
    text = customize.Text(base, cfg)
    torch.nn.init.normal_(text.row)
    ours = text.encode(["a <thing> dog", "a dog"])["encoder_hidden_states"].detach()
    plain = load_base(tiny_model, random_init=True)
    assert torch.equal(ours[1:], plain.encode_prompt(["a dog"]))
    plain.tokenizer.add_tokens("<thing>")
    plain.text_encoder.resize_token_embeddings(len(plain.tokenizer))
    plain.text_encoder.get_input_embeddings().weight.data[-1] = text.row.detach()
    assert torch.equal(ours, plain.encode_prompt(["a <thing> dog", "a dog"]))
    assert not base.text_encoder.get_input_embeddings()._forward_hooks


def test_bf16_base_and_everything_else_at_once(config):
    for method in ("lora", "custom_diffusion"):
        extras = {"use_ema": True, "mixed_precision": "bf16", "validation_steps": 2, "lora": LoraConfig(2, dropout=0.1)}
        folder = train(config(method, method=method, max_train_steps=2, **extras))
        assert all(tensor.isfinite().all() for tensor in tensors_of(folder).values())
        assert (folder / "samples" / "000001_validation.png").exists() and (folder / "README.md").exists()


def test_an_image_of_the_class_goes_with_the_prompt_that_drew_it():
    """The base's own; of a user's nobody knows."""
    latents = torch.arange(5.0).expand(2, 5)[..., None, None, None]
    generator = torch.Generator().manual_seed(0)
    for drawn in (True, False):
        examples = customize.Examples(latents, ["a", "b"], drawn)
        pairs = {(int(x), prompt) for x, prompt in (examples.draw(generator, True) for _ in range(200))}
        own = {(i, "ab"[i % 2]) for i in range(5)}
        assert pairs == own if drawn else len(pairs) == 10


def test_captions_and_masks_are_told_of(tmp_path):
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.txt").write_text("a <thing> on a table")
    with pytest.warns(UserWarning, match="has captions or masks, which training/neti.py reads"):
        assert [path.name for path in customize.image_files(tmp_path, 32)] == ["0.png", "1.png", "2.png"]


def test_min_snr_and_offset_noise_reach_the_loss(config, tiny_model):
    base = load_base(tiny_model, random_init=True)
    run, examples = Run(config()), customize.Examples(torch.zeros(2, 1, 4, 8, 8), ["a dog"])

    @torch.no_grad()
    def loss(**fields):
        cfg = config(method="lora", **fields)
        text = customize.Text(base, cfg)
        return customize.denoising_loss(run, cfg, base, text, examples, 0, [0, 1, 2], "instance")

    timestep = torch.stack([run_timestep(run, index, base) for index in range(3)])
    weight = base.schedule.min_snr_weight(timestep, 5.0).float()
    torch.testing.assert_close(loss(snr_gamma=5.0), weight * loss())
    assert not torch.isclose(loss(noise_offset=0.5), loss()).any()


def run_timestep(run: Run, index: int, base) -> torch.Tensor:
    """What `denoising_loss` draws for a sample behind its mirror image, its example, its prompt and its noise."""
    generator = run.generator(0, index, "instance")
    for high in (2, 1, 1):
        torch.randint(high, (), generator=generator)
    torch.randn(4, 8, 8, generator=generator)
    return torch.randint(base.schedule.num_train_timesteps, (), generator=generator)


def test_concept_says_where_it_belongs(config, tiny_model):
    folder = train(config(method="custom_diffusion", max_train_steps=1))
    concept = read_concept(folder)
    assert concept["base_fingerprint"] == fingerprint(load_base(tiny_model, random_init=True).unet)
    assert (concept["phrase"], concept["class_noun"]) == ("<thing> dog", "dog")


def test_dry_run_writes_nothing(config):
    cfg = config(dry_run=True)
    with pytest.raises(SystemExit) as exit:
        train(cfg)
    assert exit.value.code == 0 and not Path(cfg.output_dir).exists()


def test_class_images_of_other_settings_are_drawn_anew(config, monkeypatch):
    """What a run that was killed before its first checkpoint left is of use to the same settings alone."""
    monkeypatch.setattr(Run, "_save", lambda run: None)
    drawn = []
    sample = customize.sample
    monkeypatch.setattr(customize, "sample", lambda *args: drawn.append(1) or sample(*args))
    for fields, times in (({}, 3), ({"learning_rate": 0.5}, 2), ({"class_noun": "cat"}, 3)):
        drawn.clear()
        folder = train(config(max_train_steps=1, **fields))
        assert len(drawn) == times, fields  # before and after the training, and the class images
        (folder / "README.md").unlink()  # or it would have finished


def test_class_images_go_on_where_a_run_was_stopped(config, monkeypatch):
    """By batches; one that was cut is drawn again, and all images are those of a run that nobody stopped."""
    fields = {"num_class_images": 5, "sample_batch_size": 2, "max_train_steps": 1}
    whole = train(config("whole", **fields)) / "class_images"
    sample, seeds = customize.sample, []

    def stopped(*args):
        seeds.extend(args[4:])
        if seeds == [0, 2, 4]:
            (Path(config("part").output_dir) / "class_images.partial" / "0003.png").unlink()  # as if it had come later
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(customize, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config("part", **fields))
    assert not (Path(config("part").output_dir) / "class_images").exists()
    part = train(config("part", **fields)) / "class_images"
    assert seeds == [0, 2, 4, 2, 4]
    files = sorted(file.name for file in whole.glob("*.png"))
    assert files == sorted(file.name for file in part.glob("*.png")) == [f"{i:04d}.png" for i in range(5)]
    assert all((whole / name).read_bytes() == (part / name).read_bytes() for name in files)
    assert not (part.parent / "class_images.partial").exists()

    (part.parent / "README.md").unlink()
    (part / "0002.png").unlink()  # by somebody
    seeds.clear()
    train(config("part", **fields | {"max_train_steps": 2}))
    assert seeds[:2] == [2, 4] and all((whole / name).read_bytes() == (part / name).read_bytes() for name in files)


def test_images_of_the_class_that_are_not_finite_stop_the_run(config, monkeypatch):
    """Before they are saved: 8 bits would make them black."""

    def broken(*args, **options):
        base = load_base(*args, **options)
        base.unet.conv_out.bias.data.fill_(float("nan"))
        return base

    monkeypatch.setattr("alignkit.run.load_base", broken)
    cfg = config()
    with pytest.raises(FloatingPointError, match=r"Pictures \[0, 1, 2\] of 3 are not finite"):
        train(cfg)
    assert not list(Path(cfg.output_dir).rglob("*.png"))


def test_the_customiser_of_the_docs_trains_and_loads(tiny_model, images, tmp_path):
    """The script of docs/customize.md; what it leaves draws with AlignIT, and its keys alone have moved."""
    text = (ROOT / "docs" / "customize.md").read_text()
    script = next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if code.startswith('"""keys_only.py'))
    own = types.ModuleType("keys_only")
    sys.modules["keys_only"] = own  # where a dataclass looks its module up
    exec(script, own.__dict__)
    cfg = own.Config(
        output_dir=str(tmp_path / "run"), pretrained_model_name_or_path=tiny_model, random_init=True,
        instance_data_dir=str(images), max_train_steps=2, train_batch_size=2, learning_rate=1e-2, report_to="none",
    )  # fmt: skip
    own.train(cfg)
    base = load_base(tiny_model, random_init=True)
    before = {name: p.clone() for name, p in base.unet.named_parameters() if "attn2.to_" in name}
    loaded = load(base.pipeline(), tmp_path / "run")
    for name, attention in cross_attention(base.unet).items():
        for part, moved in (("to_k", True), ("to_v", False)):
            own_weight = getattr(attention.processor, f"{part}_custom_diffusion").weight
            assert torch.equal(own_weight, before[f"{name}.{part}.weight"]) != moved
    loaded.pipe.set_progress_bar_config(disable=True)
    with loaded.aligned() as pipe:
        pipe("a sks dog", num_inference_steps=1, guidance_scale=1.0, output_type="latent")


@pytest.mark.slow
def test_configs_run(tmp_path):
    for path in sorted((ROOT / "configs" / "customize").glob("*.yaml")):
        command = [sys.executable, "training/customize.py", "--config", str(path), "--dry-run", "--random_init"]
        if path.stem.startswith("sd"):
            command += ["--shrink", "16", "--resolution", "64", "--num_inference_steps", "1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "dry run" in done.stdout, done.stderr


def test_sdxl_learns_by_a_lora_and_its_images_are_the_stock_pipelines(config, tmp_path):
    """Both text encoders, the pooled text and the sizes: what a validation draws, the pipeline draws of the prompts."""
    fields = {"pretrained_model_name_or_path": thin("sdxl", tmp_path / "sdxl"), "shrink": 40, "resolution": 64}
    cfg = config(method="lora", max_train_steps=1, learning_rate=0.1, **fields)
    folder = train(cfg)
    base = load_base(fields["pretrained_model_name_or_path"], random_init=True, shrink=40)
    pipe = load(base.pipeline(), folder).pipe
    drawn = customize.draw(cfg, base, customize.Text(base, cfg), cfg.phrase)
    pipe.set_progress_bar_config(disable=True)
    for i, (prompt, image) in enumerate(zip(customize.validation_prompts(cfg, cfg.phrase), drawn, strict=True)):
        settings = {"num_inference_steps": cfg.num_inference_steps, "guidance_scale": cfg.guidance_scale}
        generator = torch.Generator().manual_seed(i)
        stock = pipe(prompt, **settings, height=64, width=64, generator=generator, output_type="pt").images[0]
        torch.testing.assert_close(image, stock, rtol=0, atol=1e-4)


# What is wrong is said


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"class_noun": ""}, "class_noun: expected a value"),
        ({"templates": ["a photo"]}, "one {} for the concept"),
        ({"templates": []}, "one {} for the concept"),
        ({"prior_loss_weight": 0.0}, "set with_prior_preservation to false"),
        ({"method": "dreambooth", "mixed_precision": "bf16"}, "mixed_precision: expected 'no' with method dreambooth"),
        ({"num_class_images": 0}, "num_class_images: expected at least 1"),
    ],
)
def test_wrong_config(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_wrong_data(config, images, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        train(config(instance_data_dir=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="Prompt too long"):
        train(config(templates=["a very " * 20 + "{}"]))
    with pytest.raises(ValueError, match="is a token of .* already"):
        train(config(method="custom_diffusion", placeholder_token="a"))
    (images / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        train(config())
    assert not (tmp_path / "run" / "concept.json").exists()


def test_what_a_pipeline_has_already_is_not_replaced(tmp_path, tiny_model):
    """Custom Diffusion's weights, and a LoRA of the text encoder, which another name may stand beside."""
    names, base = ("<t> dog", "dog"), load_base(tiny_model, random_init=True)
    pipe, path = base.pipeline(), save_custom_diffusion(tmp_path, base.unet)
    load(pipe, path, *names)
    before = pipe.unet.attn_processors
    with pytest.raises(ValueError, match="has Custom Diffusion's weights already"):
        load(pipe, path, *names)
    assert pipe.unet.attn_processors == before
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.text_encoder))
    pipe.unload_lora_weights()
    pipe.save_lora_weights(tmp_path / "lora", text_encoder_lora_layers=layers)
    load(pipe, tmp_path / "lora", *names)
    with pytest.raises(ValueError, match="adapter 'default' is already loaded"):
        load(pipe, tmp_path / "lora", *names)
    load(pipe, tmp_path / "lora", *names, adapter_name="second")
    assert set(pipe.text_encoder.peft_config) == {"default", "second"}


def test_a_lora_and_its_token(tmp_path, tiny_model):
    """Of pivotal tuning: both files of the folder are read."""
    base = load_base(tiny_model, random_init=True)
    pipe = base.pipeline()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]))
    save_lora(tmp_path, pipe.unet)
    row = torch.randn(1, pipe.text_encoder.config.hidden_size)
    save_embeddings(tmp_path, {"<new>": row})
    pipe.unload_lora_weights()
    load(pipe, tmp_path, "<new> dog", "dog")
    token = pipe.tokenizer.convert_tokens_to_ids("<new>")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[token], row[0])


def test_a_concept_that_says_too_little(tmp_path, tiny_model):
    save_concept(tmp_path, phrase="<t> dog", base_model="another")
    with pytest.raises(ValueError, match=r"concept.json lacks class_noun, base_fingerprint"):
        load(load_base(tiny_model, random_init=True).pipeline(), tmp_path)


def test_options_of_a_pipeline_go_along_with_dreambooth(tmp_path, tiny_model):
    pipe = tiny_sdxl(load_base(tiny_model, random_init=True).pipeline())
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.watermark = None
    own = load(pipe, tmp_path, "sks dog", "dog").pipe
    assert own.unet is not pipe.unet and own.text_encoder is pipe.text_encoder
    assert own.config.force_zeros_for_empty_prompt is False and own.watermark is None


def test_custom_diffusion_of_another_base_is_refused(tmp_path, tiny_model):
    base = load_base(tiny_model, random_init=True)
    path = save_custom_diffusion(tmp_path, base.unet)
    load_custom_diffusion(base.pipeline(), path)
    other = load_base("sd15", random_init=True, shrink=16)
    before = dict(other.unet.attn_processors)
    with pytest.raises(ValueError, match="does not fit this base model"):
        load_custom_diffusion(other.unet, tmp_path)
    assert dict(other.unet.attn_processors) == before
