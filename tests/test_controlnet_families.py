"""ControlNets of SDXL, SD3 and FLUX on small random weights: what they learn by, and the stock pipelines' calls."""

import inspect
import json

import pytest
import torch
from diffusers import FluxControlNetPipeline, StableDiffusion3ControlNetPipeline, StableDiffusionXLControlNetPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import nn

from alignkit import cli, evaluate
from alignkit.base import load_base
from alignkit.composed import compose
from alignkit.conditions import build_condition
from alignkit.controlnet import (
    control_input,
    draw_controlled,
    load_controlnet,
    new_controlnet,
    predict,
    save_controlnet,
)
from alignkit.families import pack, patch_ids, unpack
from tests.test_families import SHRINK, thin
from training.controlnetpp import controlnet_losses

PIPELINES = {
    "sdxl": StableDiffusionXLControlNetPipeline,
    "sd3": StableDiffusion3ControlNetPipeline,
    "flux": FluxControlNetPipeline,
}
BLOCKS = {"sd3": {"num_layers": 2}}  # the last one takes no residual
BATCH, SIZE = 3, (32, 64)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The small base of a name, made once."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = thin(name, tmp_path_factory.mktemp(name), **BLOCKS.get(name, {}))
            made[name] = load_base(folder, random_init=True, shrink=SHRINK)
        return made[name]

    return get


def new(base, **changes) -> nn.Module:
    """As it begins; `changes` are of its config."""
    controlnet = new_controlnet(base.network, base.vae_scale_factor).requires_grad_(True).eval()
    return type(controlnet).from_config({**controlnet.config, **changes}) if changes else controlnet


def moved(controlnet: nn.Module) -> nn.Module:
    """As after some training: without zeros."""
    generator = torch.Generator().manual_seed(7)
    for parameter in controlnet.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return controlnet


def told(base, guidance_scale: float = 1.0) -> dict[str, torch.Tensor]:
    return base.condition(["a cat", "a dog", ""], *SIZE) | base.guidance(BATCH, guidance_scale)


def losses_of(base, controlnet, rewarded=None):
    """Of a batch whose first and last samples show enough for a reward, unless told which."""
    generator = torch.Generator().manual_seed(0)
    condition = build_condition("tests.toy_conditions:Red")
    targets = torch.rand(BATCH, *SIZE, generator=generator)
    x_0 = torch.randn(BATCH, *base.latent_shape(*SIZE), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    timestep = torch.tensor([100, 800, 300]) if base.schedule.is_flow else torch.tensor([10, 500, 150])
    if rewarded is None:
        rewarded = base.schedule.snr(timestep) >= 3.06  # SD's t <= 200, for any family
        assert rewarded.tolist() == [True, False, True]
    shown, embeds = control_input(base, controlnet, condition.control(targets)), told(base)
    return controlnet_losses(
        lambda x_t, t: predict(base, controlnet, x_t, t, shown, embeds), base.schedule, x_0, noise, timestep, rewarded,
        base.decode, lambda images, rows: condition(images, targets[rows]),
    )  # fmt: skip


def parts(base) -> list[nn.Module]:
    return [part for part in base.pipe.components.values() if isinstance(part, nn.Module)]


@pytest.mark.parametrize("name", PIPELINES)
def test_training_steps(bases, name):
    base, controlnet = bases(name), new(bases(name))
    before = {key: tensor.clone() for key, tensor in base.network.state_dict().items()}
    optimizer = torch.optim.Adam(controlnet.parameters(), lr=1e-2)
    history = []
    for _ in range(4):
        losses = losses_of(base, controlnet)
        assert (losses.reward > 0).tolist() == [True, False, True]
        loss = losses.diffusion.mean() + losses.reward.sum() / 2
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[-1] < history[0]
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.network.state_dict().items())


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_new_one_changes_nothing_and_learns_by_its_zeros_first(bases, name):
    base = bases(name)
    config = dict(base.network.config)
    controlnet = new(base)
    assert dict(base.network.config) == config  # diffusers' from_transformer writes into SD3's
    theirs = base.network.state_dict()
    copied = {key for key, tensor in controlnet.state_dict().items() if key in theirs and tensor.any()}
    assert copied and all(torch.equal(controlnet.state_dict()[key], theirs[key]) for key in copied)
    x_t, timestep = torch.randn(BATCH, *base.latent_shape(*SIZE)), torch.tensor([5.0, 700.0, 300.0])
    shown, condition = control_input(base, controlnet, torch.rand(BATCH, 3, *SIZE)), told(base)
    output = predict(base, controlnet, x_t, timestep, shown, condition)
    assert torch.equal(output, base.forward(x_t, timestep, condition))
    output.square().sum().backward()
    touched = {key for key, p in controlnet.named_parameters() if p.grad is not None and p.grad.any()}
    zeros = {
        key for key, _ in controlnet.named_parameters() if key.startswith(("controlnet_block", "controlnet_single"))
    }
    assert touched == zeros


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_reward_alone_reaches_the_controlnet_and_nothing_else(bases, name):
    base, controlnet = bases(name), moved(new(bases(name)))
    losses_of(base, controlnet, torch.tensor([True, False, False])).reward.sum().backward()
    assert all(parameter.grad is None for part in parts(base) for parameter in part.parameters())
    missed = {key for key, p in controlnet.named_parameters() if p.grad is None or not p.grad.any()}
    # what SD3's last block makes of the text is read by no block behind it
    last = "transformer_blocks.0."
    text = [f"{last}{part}" for part in ("ff_context", "norm1_context", "attn.add_q_proj", "attn.to_add_out")]
    assert all(name == "sd3" and key.startswith(tuple(text)) for key in missed), missed


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_checkpointing_changes_no_gradient(bases, name):
    base, gradients = bases(name), []
    for on in (False, True):
        controlnet = moved(new(base))
        checkpointed = (controlnet, base.network, base.vae)
        for module in checkpointed if on else ():
            module.enable_gradient_checkpointing()
        losses = losses_of(base, controlnet)
        (losses.diffusion.mean() + losses.reward.sum()).backward()
        for module in checkpointed:
            module.disable_gradient_checkpointing()
        gradients.append({key: p.grad for key, p in controlnet.named_parameters() if p.grad is not None})
    one, two = gradients
    assert one.keys() == two.keys()
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-4, atol=1e-6)


def test_a_half_precision_base_beside_float32_weights(bases, tmp_path):
    for name in ("sd3", "flux"):
        folder = thin(name, tmp_path / name, **BLOCKS.get(name, {}))
        base = load_base(folder, random_init=True, shrink=SHRINK, dtype=torch.bfloat16)
        controlnet = moved(new(base))
        losses_of(base, controlnet).diffusion.sum().backward()
        gradients = [p.grad for p in controlnet.parameters() if p.grad is not None]
        assert gradients and all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


# The stock pipelines


def recorded(network: nn.Module, calls: list[dict]) -> torch.utils.hooks.RemovableHandle:
    """What each call is given, by name, leaving out what is not."""
    names = inspect.signature(inspect.unwrap(type(network).forward))

    def hook(module, args, kwargs):
        given = names.bind(None, *args, **kwargs).arguments
        calls.append({key: value for key, value in given.items() if isinstance(value, torch.Tensor | list | float)})

    return network.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sd3", {}),
        ("sd3", {"force_zeros_for_pooled_projection": True}),  # as InstantX's
        ("flux", {}),
        ("flux", {"guidance_embeds": False}),
    ],
    ids=str,
)
def test_each_call_is_the_stock_pipelines(bases, tmp_path, monkeypatch, name, changes):
    """Of ControlNet and transformer, with the same inputs; and so are the images."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    base = bases(name)
    save_controlnet(tmp_path, moved(new(base, **changes)))
    ours = load_controlnet(str(tmp_path), base.network, base.vae_scale_factor)
    stock = PIPELINES[name](**base.pipeline().components, controlnet=type(ours).from_pretrained(tmp_path).eval())
    stock.set_progress_bar_config(disable=True)
    control, settings = torch.rand(1, 3, *SIZE), {"num_inference_steps": 2, "guidance_scale": 3.0}
    if name == "sd3":
        settings["negative_prompt"] = "bad"
    calls = {"ours": [], "theirs": []}
    handles = [recorded(network, calls["ours"]) for network in (ours, base.network)]
    drawn = draw_controlled(base, ours, control, ["a cat"], [3], conditioning_scale=0.7, **settings)
    for handle in handles:
        handle.remove()
    handles = [recorded(network, calls["theirs"]) for network in (stock.controlnet, stock.transformer)]
    expected = stock(
        "a cat", control_image=2 * control - 1, controlnet_conditioning_scale=0.7, output_type="pt",
        generator=torch.Generator().manual_seed(3), **settings,
    ).images  # fmt: skip
    for handle in handles:
        handle.remove()
    assert len(calls["ours"]) == len(calls["theirs"]) == 4
    for one, two in zip(calls["ours"], calls["theirs"], strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, two[key], rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    plain = draw_controlled(base, ours, control, ["a cat"], [3], conditioning_scale=0.0, **settings)
    assert (drawn - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_commands_draw_with_it(bases, tmp_path, monkeypatch, name):
    """`alignkit generate --controlnet`, `alignkit evaluate controllability` and compose, from its folder."""
    base, folder = bases(name), str(tmp_path / "controlnet")
    save_controlnet(folder, moved(new(base)))
    pipe = compose(base, controlnet=folder).pipe
    assert type(pipe) is PIPELINES[name] and pipe.transformer is base.network
    monkeypatch.setattr("alignkit.base.load_base", lambda *args, **options: base)
    monkeypatch.setattr(base.pipe, "default_sample_size", 4)  # for 1024 pixels take minutes here
    pipe.image_processor.numpy_to_pil(torch.rand(1, 32, 32, 3).numpy())[0].save(tmp_path / "control.png")
    control, drawn = {"controlnet": folder, "control_image": str(tmp_path / "control.png")}, []
    for options in (control, {}):
        (path,) = cli.generate("a cat", model=name, num_inference_steps=1, output_dir=str(tmp_path), **options)
        with Image.open(path) as image:
            drawn.append(image.convert("RGB"))
    assert drawn[0].size == (32, 32) and drawn[0].tobytes() != drawn[1].tobytes()
    settings = {"base": name, "clip": "emoji/evaluator/clip", "device": "cpu"}
    if name == "flux":
        with pytest.raises(ValueError, match="reads no negative prompt"):
            evaluate.controllability([folder], "lineart", number=1, negative_prompt="bad", **settings)
    rows = evaluate.controllability([folder], "lineart", number=2, num_inference_steps=1, **settings)
    assert [row["model"] for row in rows] == ["real", folder] and rows[1]["scheduler"] == "Euler"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd3", {"joint_attention_dim": None}, "of another base: its joint_attention_dim is None"),
        ("sd3", {"extra_conditioning_channels": 1}, "latents of one control and nothing else; its extra_.* is 1"),
        ("flux", {"num_attention_heads": 3}, "of another base: its num_attention_heads is 3, this base's is 1"),
        ("flux", {"num_mode": 7}, "its num_mode is 7. Stock diffusers draws with it, loaded as a FluxControlNetModel"),
        ("flux", {"conditioning_embedding_channels": 8}, "its conditioning_embedding_channels is 8"),
        ("sd3", {"_class_name": "FluxControlNetModel"}, "expected a SD3ControlNetModel, got FluxControlNetModel"),
    ],
)
def test_what_does_not_fit_is_refused(bases, tmp_path, name, changes, message):
    base = bases(name)
    save_controlnet(tmp_path, new(base))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_controlnet(str(tmp_path), base.network, base.vae_scale_factor)


def test_numbers_of_blocks(bases):
    """diffusers' defaults as far as the base has them, and none that it cannot give."""
    sd3, flux, sdxl = (bases(name).network for name in ("sd3", "flux", "sdxl"))
    assert new_controlnet(sd3, 8).config.num_layers == 1
    made = new_controlnet(flux, 8, num_single_layers=0)
    assert (made.config.num_layers, made.config.num_single_layers) == (1, 0)
    for network, depths, message in [
        (sd3, {"num_layers": 2}, "num_layers: expected 0 to 1 blocks of this base, got 2"),
        (sd3, {"num_layers": 0}, "at least one block"),
        (
            sd3,
            {"num_single_layers": 1},
            "num_single_layers: a ControlNet of a SD3Transformer2DModel has no such choice",
        ),
        (flux, {"num_layers": 0, "num_single_layers": 0}, "at least one block"),
        (sdxl, {"num_layers": 1}, "num_layers: a ControlNet of a UNet2DConditionModel has no such choice"),
    ]:
        with pytest.raises(ValueError, match=message):
            new_controlnet(network, 8, **depths)


def test_a_file_or_another_network_is_refused(bases, tmp_path):
    base = bases("flux")
    weights = save_controlnet(tmp_path, new(base))
    with pytest.raises(ValueError, match="expected a folder in diffusers format, whose config.json says how many"):
        load_controlnet(str(weights), base.network, base.vae_scale_factor)
    with pytest.raises(ValueError, match="this network is a Linear"):
        new_controlnet(nn.Linear(1, 1), 8)


def test_packing_is_diffusers():
    latents = torch.randn(2, 4, 6, 8)
    expected = FluxControlNetPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), expected)
    assert torch.equal(unpack(expected, 6, 8), latents)
    ids = FluxControlNetPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(patch_ids(3, 4), ids)
