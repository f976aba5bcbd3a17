import importlib.util
import json
import shutil

import pytest
import torch
from diffusers import PipelineQuantizationConfig, StableDiffusionPipeline, UNet2DConditionModel

from alignkit.base import add_lora, load_base
from alignkit.random_init import ARCHITECTURES

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def base():
    return load_base("sd15", random_init=True, shrink=32)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """The same model as a diffusers folder."""
    path = tmp_path_factory.mktemp("base")
    base.pipeline().save_pretrained(path)
    return path


def sd15_unet_on_meta():
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(ARCHITECTURES["sd15"], subfolder="unet")
        )


def latents(base, batch=1, side=8, seed=0):
    return torch.randn(batch, base.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed))


# Loading


def test_shrinking_keeps_every_layer_by_name(base):
    full = dict(sd15_unet_on_meta().named_parameters())
    assert sum(p.numel() for p in full.values()) == 859_520_964  # SD 1.5's U-Net
    assert [name for name, _ in base.unet.named_parameters()] == list(full)
    assert base.unet.config.cross_attention_dim == base.text_encoder.config.hidden_size == 24
    assert sum(p.numel() for p in base.unet.parameters()) < 1_000_000


@pytest.mark.parametrize("shrink", [3, 7, 10, 40, 1000])
def test_any_shrink_draws(shrink):
    base = load_base("stable-diffusion-v1-5/stable-diffusion-v1-5", random_init=True, shrink=shrink)
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()


def test_text_encoders_on_the_cpu_encode_each_prompt_once(base, folder, monkeypatch):
    """The network is elsewhere (on the meta device here), and gets what the encoders would have told it there."""
    away = load_base(str(folder), device="meta", offload_text_encoders=True)
    assert away.device.type == away.vae.device.type == "meta" and away.text_encoder.device.type == "cpu"
    encoded = []
    away.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    assert away.condition(["a cat", "", "a cat"])["encoder_hidden_states"].device.type == "meta"
    away.condition(["", "a cat"])
    assert encoded == [1, 1]

    home = load_base(str(folder), offload_text_encoders=True)
    told = home.condition(["a cat", "", "a cat"])["encoder_hidden_states"]
    torch.testing.assert_close(told, base.condition(["a cat", "", "a cat"])["encoder_hidden_states"])
    home.condition(["a cat"])["guidance"] = torch.ones(1)  # what a caller adds is its own
    assert home.condition(["a cat"]).keys() == {"encoder_hidden_states"}
    monkeypatch.setattr("alignkit.base.KNOWN_PROMPTS", 2)
    home.condition(["a dog", "a bird", "a fish"])
    assert [key[0] for key in home._known] == ["a bird", "a fish"]


def test_a_quantised_network(folder, monkeypatch):
    """Half of it is a fake: what diffusers does with a config is diffusers' own."""
    with pytest.raises(ValueError, match="set it to 'no' with random_init, alignkit plan"):
        load_base("sd15", random_init=True, quantization="nf4")
    with pytest.raises(ValueError, match="expected no, nf4 or int8, got 'int3'"):
        load_base(str(folder), quantization="int3")
    for name, library in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        if importlib.util.find_spec(library) is None:
            with pytest.raises(ValueError, match=f"quantization {name} is not possible here: .*{library}"):
                load_base(str(folder), quantization=name)

    seen, read, config = [], StableDiffusionPipeline.from_pretrained, PipelineQuantizationConfig.__new__
    monkeypatch.setattr("alignkit.base._quantization", lambda name, family, dtype: (name, family.network, dtype))

    def from_pretrained(path, quantization_config=None, **options):
        seen.append(quantization_config)
        return read(path, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    load_base(str(folder), dtype=torch.bfloat16, quantization="nf4")
    own = config(PipelineQuantizationConfig)  # of the user's, for any part
    load_base(str(folder), quantization=own)
    load_base(str(folder))
    assert seen == [("nf4", "unet", torch.bfloat16), own, None]


def test_a_lora_learns_on_a_base_of_int8(folder):
    """Values and gradients are those of a base that has the rounded weights as floats."""
    pytest.importorskip("torchao")
    bases = [load_base(str(folder), quantization=quantization) for quantization in ("int8", "no")]
    rounded = {name: m.weight for name, m in bases[0].unet.named_modules() if hasattr(m, "in_features")}
    for name, weight in rounded.items():
        whole = bases[1].unet.get_submodule(name).weight
        assert not torch.equal(whole, weight.dequantize())
        whole.data.copy_(weight.dequantize())
    results = []
    for base in bases:
        lora = add_lora(base.network, 2, 2, ATTENTION)
        generator = torch.Generator().manual_seed(0)
        for name in sorted(lora):
            lora[name].data.normal_(std=0.1, generator=generator)
        x_t = latents(base, batch=2).requires_grad_()
        output = base.forward(x_t, torch.tensor(500), base.condition(["a cat", "a dog"]))
        output.square().sum().backward()
        gradient = torch.cat([lora[name].grad.flatten() for name in sorted(lora)])
        results.append([output.detach(), x_t.grad, gradient])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_random_init_is_always_the_same_and_leaves_the_global_state_alone(base):
    before = torch.get_rng_state()
    again = load_base("sd15", random_init=True, shrink=32)
    assert torch.equal(before, torch.get_rng_state())
    for module in ("unet", "vae", "text_encoder"):
        one, two = getattr(base, module).state_dict(), getattr(again, module).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_frozen_and_in_eval_mode(base):
    for module in (base.unet, base.vae, base.text_encoder):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_dtype(folder):
    for base in (
        load_base("sd15", random_init=True, shrink=32, dtype=torch.bfloat16),
        load_base(str(folder), dtype=torch.bfloat16),
    ):
        assert base.unet.dtype == base.vae.dtype == base.text_encoder.dtype == torch.bfloat16
        assert base.encode_prompt(["a cat"]).dtype == torch.bfloat16
        assert base.decode(latents(base)).dtype == torch.float32  # rewards are computed in float32


def test_folder_gives_the_same_model_and_random_init_reads_its_configs(base, folder):
    loaded = load_base(str(folder))
    assert torch.equal(loaded.encode_prompt(["a red cat"]), base.encode_prompt(["a red cat"]))
    assert torch.equal(loaded.decode(latents(base)), base.decode(latents(base)))
    drawn = load_base(str(folder), random_init=True)
    assert drawn.unet.config.block_out_channels == list(base.unet.config.block_out_channels)
    assert drawn.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def test_any_sampler_of_the_folder_becomes_ddim_on_the_same_schedule(base, folder):
    """SD 1.5 comes with PNDM, whose multistep state cannot be differentiated step by step."""
    stock = StableDiffusionPipeline.from_pretrained(
        ARCHITECTURES["sd15"], unet=None, vae=None, text_encoder=None, tokenizer=None, safety_checker=None
    )
    assert type(stock.scheduler).__name__ == "PNDMScheduler"
    assert torch.equal(base.scheduler.alphas_cumprod, stock.scheduler.alphas_cumprod)
    assert base.scheduler.final_alpha_cumprod == base.scheduler.alphas_cumprod[0]  # set_alpha_to_one: false
    base.scheduler.set_timesteps(25)
    assert base.schedule.timesteps(25).tolist() == base.scheduler.timesteps.tolist()
    assert not base.scheduler.config.clip_sample


def test_a_schedule_without_closed_form_is_refused(folder, tmp_path):
    """DDIM would take the config of either for one of its own."""
    for name, message in (
        ("EDMEulerScheduler", "no alphas_cumprod"),
        ("FlowMatchEulerDiscreteScheduler", "expected a"),
    ):
        copy = shutil.copytree(folder, tmp_path / name)
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
        (copy / "scheduler" / "scheduler_config.json").write_text("{}")
        with pytest.raises(ValueError, match=message):
            load_base(str(copy))


def test_wrong_names_and_families_are_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="No base model 'nowhere'"):
        load_base("nowhere")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="is a KandinskyPipeline. Supported are"):
        load_base(str(tmp_path))
    with pytest.raises(ValueError, match="shrink"):
        load_base(str(tmp_path), shrink=2)


# Text and images


def test_encode_prompt_equals_the_stock_pipeline(base):
    prompts = ["a cat", "two dogs left of a tree, 3 roses!", ""]
    embeds, negative = base.pipeline().encode_prompt(prompts, "cpu", 1, True)
    assert torch.equal(base.encode_prompt(prompts), embeds)
    assert torch.equal(base.encode_prompt([""] * 3), negative)
    assert embeds.shape == (3, base.text_encoder.config.max_position_embeddings, base.text_encoder.config.hidden_size)


def test_a_folder_without_tokenizer_gets_one_that_tells_letters_apart(base):
    ids = base.tokenizer("a cat").input_ids
    assert base.tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "a</w>", "c", "a", "t</w>", "<|endoftext|>"]
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == "a cat"
    one, two = base.encode_prompt(["a cat", "a dog"])
    assert not torch.equal(one, two)
    config = base.text_encoder.config
    assert config.vocab_size == len(base.tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id)


def test_prompts_that_would_be_cut_are_refused(base):
    base.encode_prompt(["a" * 75])  # begin + 75 + end = 77
    with pytest.raises(ValueError, match="reads 77 tokens, this one has 78"):
        base.encode_prompt(["a cat", "a" * 76])
    with pytest.raises(TypeError, match="list of prompts"):
        base.encode_prompt("a cat")


def test_decode_equals_the_stock_pipeline_and_encode_inverts_its_scaling(base):
    stock, x_0 = base.pipeline(), latents(base)
    decoded = stock.vae.decode(x_0 / stock.vae.config.scaling_factor).sample
    assert torch.equal(base.decode(x_0), stock.image_processor.postprocess(decoded, output_type="pt"))
    images = torch.rand(2, 3, 64, 64)
    posterior = stock.vae.encode(stock.image_processor.preprocess(images)).latent_dist
    assert torch.equal(base.encode(images), posterior.mean * stock.vae.config.scaling_factor)


def test_decode_has_the_gradient_of_the_unclamped_image(base):
    """Scaled until most pixels saturate: the values are clamped to [0, 1] exactly, the gradient is not cut."""
    weight = base.vae.decoder.conv_out.weight
    kept = weight.data.clone()
    try:
        weight.data.mul_(1e3)
        x_0 = latents(base).requires_grad_()
        images = base.decode(x_0)
        raw = base.vae.decode(x_0 / base.vae.config.scaling_factor).sample / 2 + 0.5
        assert ((raw < 0) | (raw > 1)).float().mean() > 0.5
        assert torch.equal(images, raw.clamp(0, 1))
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        (got,) = torch.autograd.grad((images * direction).sum(), x_0)
        (expected,) = torch.autograd.grad((raw * direction).sum(), x_0)
        assert torch.equal(got, expected) and got.abs().min() > 0
    finally:
        weight.data.copy_(kept)


def test_latent_shape(base):
    assert base.latent_shape() == (4, 64, 64)
    assert base.latent_shape(height=128, width=64) == (4, 16, 8)
    assert base.latent_shape(height=128) == (4, 16, 64)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 100"):
        base.latent_shape(height=100)


def test_pipeline_draws_what_the_stock_pipeline_draws(base, folder):
    ours, stock = base.pipeline(), StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert ours.unet is base.unet and ours.scheduler is not base.scheduler
    images = []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(
            pipe("a cat", num_inference_steps=3, height=64, width=64, generator=generator, output_type="pt").images
        )
    assert torch.equal(*images)


# LoRA


@pytest.mark.parametrize(("rank", "size"), [(4, 797_184), (8, 1_594_368), (32, 6_377_472)])
def test_lora_size_on_sd15(rank, size):
    unet = sd15_unet_on_meta().requires_grad_(False)
    assert sum(p.numel() for p in add_lora(unet, rank, rank, ATTENTION).values()) == size


def test_lora_changes_nothing_at_first_and_trains_alone():
    base = load_base("sd15", random_init=True, shrink=40)
    x_T, t, text = latents(base, side=16), torch.tensor(500), base.encode_prompt(["a cat"])  # 2 x 2 in the middle
    before = base.unet(x_T, t, text).sample
    parameters = add_lora(base.unet, rank=4, lora_alpha=8, target_modules=ATTENTION)
    after = base.unet(x_T, t, text).sample
    assert torch.equal(before, after)
    after.square().mean().backward()
    with_gradient = {name for name, p in base.unet.named_parameters() if p.grad is not None}
    assert with_gradient == set(parameters) == {name for name, p in base.unet.named_parameters() if p.requires_grad}
    # B = 0 leaves A without a gradient on the first step (and only on the first).
    assert all((p.grad.abs().max() > 0) == (".lora_B." in name) for name, p in parameters.items())


def test_lora_init_depends_on_the_seed_alone():
    def draw(dtype=torch.float32, seed=0):
        base = load_base("sd15", random_init=True, shrink=40, dtype=dtype)
        return add_lora(base.unet, rank=4, lora_alpha=4, target_modules=ATTENTION, seed=seed)

    one = draw()
    before = torch.get_rng_state()
    half = draw(torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.dtype == torch.float32 for p in half.values())
    assert all(torch.equal(one[name], half[name]) for name in one)
    a = next(name for name in one if ".lora_A." in name)
    assert not torch.equal(one[a], draw(seed=1)[a])
    values = torch.cat([p.flatten() for name, p in one.items() if ".lora_A." in name])
    assert values.std().item() == pytest.approx(1 / 4, rel=0.02)  # N(0, 1/rank^2), about 6,000 numbers


def test_lora_refuses_what_it_cannot_mean():
    base = load_base("sd15", random_init=True, shrink=40)
    with pytest.raises(ValueError, match="ends in 'to_qq'. Did you mean 'to_q'"):
        add_lora(base.unet, 4, 4, ["to_k", "to_qq"])
    add_lora(base.unet, 4, 4, ["to_k"])
    with pytest.raises(ValueError, match="has an adapter already: default"):
        add_lora(base.unet, 4, 4, ["to_k"])
