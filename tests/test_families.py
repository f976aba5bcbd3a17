"""Every family of base models: AlignProp trains on it, and draws what the stock pipeline draws.

This walks the first column of README's table, tests/test_what_works.py the others. The models are built from the real
classes and the published configs, one layer where those have many, at a fortieth of their widths.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from alignkit.artifacts import load_lora, save_lora
from alignkit.base import add_lora, load_base
from alignkit.config import LoraConfig
from alignkit.families import FAMILIES
from alignkit.random_init import ARCHITECTURES
from alignkit.rewards import RewardConfig
from tests.what_works import table
from training import alignprop
from training.alignprop import Config, PlanConfig

NAMES = ["sd15", "sd21", "sdxl", "sd3", "flux"]
WORKS = [base for base, cell in table()["AlignProp and its relatives"].items() if cell == "yes"]
ONE_LAYER = ("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers", "layers_per_block")
SHRINK = 40


def thin(name: str, folder: Path, **changes) -> str:
    """The architecture `name` with one layer for many, as a folder for random_init; `changes` go into its network."""
    source = Path(ARCHITECTURES[name])
    for path in source.rglob("*.json"):
        config = json.loads(path.read_text())
        config |= {key: 1 for key in ONE_LAYER if key in config}
        if "transformer_layers_per_block" in config:
            config["transformer_layers_per_block"] = [1] * len(config["transformer_layers_per_block"])
        if path.parent.name in ("unet", "transformer"):
            config |= changes
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {"emoji": "emoji"} | {name: thin(name, tmp_path_factory.mktemp(name)) for name in NAMES}


def tiny(folder: str, **options):
    return load_base(folder, random_init=True, shrink=SHRINK, **options)


def draw(pipe, prompts: list[str], cfg: Config) -> torch.Tensor:
    """What the stock pipeline makes of each prompt and its number as a seed."""
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(
            prompt,
            num_inference_steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            height=cfg.resolution,
            width=cfg.resolution,
            generator=torch.Generator().manual_seed(i),
            output_type="np",
        ).images
        for i, prompt in enumerate(prompts)
    ]
    return torch.cat([torch.from_numpy(image).permute(0, 3, 1, 2) for image in images])


@pytest.mark.parametrize("name", WORKS)
def test_alignprop_trains_and_stock_diffusers_draws_the_same_pixels(name, folders, tmp_path, monkeypatch):
    """One update through the whole chain: base and LoRA draw in a fresh stock pipeline what they drew in training."""
    seen = {}
    monkeypatch.setattr("alignkit.run.load_base", lambda *args, **kw: seen.setdefault("base", load_base(*args, **kw)))
    export = alignprop.export

    def spy(run, validation, *args):
        export(run, validation, *args)
        seen.update(before=validation.base_images, after=validation.images, prompts=validation.prompts.prompts)

    monkeypatch.setattr(alignprop, "export", spy)
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\n")
    cfg = Config(
        output_dir=str(tmp_path / "run"),
        pretrained_model_name_or_path=folders[name],
        random_init=True,
        shrink=SHRINK,
        prompt_file=str(tmp_path / "prompts.txt"),
        rewards=[RewardConfig("tests.toy_rewards:Red")],
        plan=PlanConfig("full"),
        lora=LoraConfig(rank=2, alpha=6),
        learning_rate=0.1,
        num_inference_steps=2,
        guidance_scale=3.0,
        resolution=64,
        max_train_steps=1,
        train_batch_size=2,
        num_validation_images=2,
        validation_steps=0,
        report_to="none",
    )
    folder = alignprop.train(cfg)
    assert all(p.grad is None for p in seen["base"].network.parameters() if not p.requires_grad)

    pipe = tiny(folders[name]).pipeline()
    assert type(pipe).__name__ in FAMILIES
    torch.testing.assert_close(draw(pipe, seen["prompts"], cfg), seen["before"], rtol=0, atol=1e-4)
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(draw(pipe, seen["prompts"], cfg), seen["after"], rtol=0, atol=1e-4)
    assert (seen["after"] - seen["before"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "size"),
    [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684), ("sd3", 2_028_328_000),
     ("flux", 11_901_408_320)],
)  # fmt: skip
def test_architectures_are_the_published_ones(name, size):
    family = FAMILIES[json.loads(Path(ARCHITECTURES[name], "model_index.json").read_text())["_class_name"]]
    cls = family.components[family.network]
    with torch.device("meta"):
        network = cls.from_config(cls.load_config(ARCHITECTURES[name], subfolder=family.network))
    assert sum(p.numel() for p in network.parameters()) == size


def test_sdxl_zeroes_empty_negative_prompts_only(folders):
    base = tiny(folders["sdxl"])
    negative = base.condition(["", "a cat"], 64, 128, negative=True)
    positive = base.condition(["", "a cat"], 64, 128)
    for key in ("encoder_hidden_states", "text_embeds"):
        assert not negative[key][0].any() and positive[key][0].any()
        assert torch.equal(negative[key][1], positive[key][1])
    assert positive["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * 2


def test_a_vae_that_overflows_in_float16_stays_float32(folders):
    half = tiny(folders["sdxl"], dtype=torch.float16)
    assert half.vae.dtype == torch.float32 and half.network.dtype == torch.float16
    assert tiny(folders["sdxl"], dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_sd3_is_published_without_t5_too(folders, tmp_path):
    """Zeros stand in its place, as in the stock pipeline; prompts are as long as CLIP reads."""
    whole = tiny(folders["sd3"]).pipeline()
    whole.register_modules(text_encoder_3=None, tokenizer_3=None)
    whole.save_pretrained(tmp_path / "sd3")
    base = load_base(str(tmp_path / "sd3"))
    assert base.pipe.text_encoder_3 is None
    embeds, _, pooled, _ = whole.encode_prompt(["a cat"], None, None, do_classifier_free_guidance=False)
    condition = base.condition(["a cat"])
    assert torch.equal(condition["encoder_hidden_states"], embeds)
    assert torch.equal(condition["pooled_projections"], pooled)
    assert not embeds[:, 77:].any()
    with pytest.raises(ValueError, match="reads 77 tokens, this one has 102"):
        base.check_prompts(["a" * 100])
    with pytest.raises(ValueError, match=r"(?s)this one has 102.*92 tokens: 'a.*and 1 more$"):
        base.check_prompts(["a", "a" * 100, *["a" * 90] * 5])
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a cat", num_inference_steps=1, guidance_scale=1.0, height=32, width=32, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_stock_pipelines_draw_in_float16(name, folders):
    """Their latents are halves and the VAE is not."""
    pipe = tiny(folders[name], dtype=torch.float16).pipeline()
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a cat", num_inference_steps=1, guidance_scale=1.0, height=32, width=32, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_flux_reads_its_guidance_and_refuses_what_it_cannot_read(folders, tmp_path):
    base = tiny(folders["flux"])
    x_t, t = torch.randn(1, *base.latent_shape(32, 64)), torch.tensor(700.0)
    with torch.no_grad():
        one, two = (base.denoiser(["a cat"], "", scale, 32, 64)(x_t, t) for scale in (1.0, 4.0))
    assert one.shape == x_t.shape and not torch.equal(one, two)
    with pytest.raises(ValueError, match="reads no negative prompt, got 'a dog'"):
        base.denoiser(["a cat"], "a dog", 3.5, 32, 64)
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 72"):
        base.latent_shape(72, 64)
    with pytest.raises(ValueError, match="reads 512 tokens, this one has 602"):
        base.check_prompts(["a" * 600])
    with pytest.raises(ValueError, match="whose network is a transformer"):
        base.unet  # noqa: B018
    schnell = tiny(thin("flux", tmp_path, guidance_embeds=False))
    schnell.denoiser(["a cat"], "", 1.0, 32, 64)
    with pytest.raises(ValueError, match="set guidance_scale to 1, got 3.5"):
        schnell.denoiser(["a cat"], "", 3.5, 32, 64)


def test_a_lora_fits_its_own_family_and_is_refused_by_another(folders, tmp_path):
    for name in ("sdxl", "sd3", "flux"):
        network = tiny(folders[name]).network
        saved = add_lora(network, 2, 6, ["to_q"])
        for parameter in saved.values():
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
        save_lora(tmp_path / name, network)
        network = tiny(folders[name]).network
        load_lora(network, tmp_path / name)
        loaded = {key: p for key, p in network.named_parameters() if key in saved}
        assert loaded.keys() == saved.keys()
        for key, parameter in loaded.items():
            torch.testing.assert_close(parameter, saved[key] * (3 if ".lora_B." in key else 1))  # alpha / rank
    with pytest.raises(ValueError, match="expected LoRA keys of a unet .* made for another family"):
        load_lora(tiny(folders["sd15"]).network, tmp_path / "flux")
    with pytest.raises(ValueError, match="does not fit this base model"):
        load_lora(tiny(folders["sd15"]).network, tmp_path / "sdxl")
    flux = tiny(folders["flux"]).network
    with pytest.raises(ValueError, match="expected LoRA keys of a transformer .* made for another family"):
        load_lora(flux, tmp_path / "sdxl")
    fused = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": torch.ones(8, 8) for side in ("down", "up")}
    save_file(fused, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="does not fit this base model: diffusers reads no LoRA of FLUX from it"):
        load_lora(flux, tmp_path / "kohya.safetensors")


@pytest.mark.parametrize("tokens", [16, 1024, 4096])
def test_dynamic_shift_equals_diffusers(folders, tokens):
    """The timesteps that FluxPipeline sets: sigmas from 1 to 1/N, shifted by exp(mu), mu linear in the tokens."""
    schedule = tiny(folders["flux"]).schedule
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ARCHITECTURES["flux"], subfolder="scheduler")
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    for n in (1, 4, 28):
        scheduler.set_timesteps(n, sigmas=torch.linspace(1, 1 / n, n).tolist(), mu=mu)
        torch.testing.assert_close(schedule.timesteps(n, tokens), scheduler.timesteps)
    with pytest.raises(ValueError, match="pass image_tokens"):
        schedule.timesteps(4)
