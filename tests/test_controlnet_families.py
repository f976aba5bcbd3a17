"""The loss of training/controlnetpp.py on SDXL, SD3 and FLUX, built small: a step runs, and each lowers the loss."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from alignkit.conditions import build_condition
from alignkit.controlnet import (
    encode_control,
    flux_predict,
    new_controlnet,
    pack,
    patch_ids,
    sd3_predict,
    unet_predict,
    unpack,
)
from alignkit.noise import NoiseSchedule
from training.controlnetpp import controlnet_losses

BATCH = 3


def vae(latent_channels: int, shift_factor: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=latent_channels, norm_num_groups=4, sample_size=16,
        scaling_factor=0.5, shift_factor=shift_factor,
    )  # fmt: skip


def sdxl():
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    controlnet = new_controlnet(unet, 2)
    assert isinstance(controlnet, ControlNetModel)
    added = {"text_embeds": torch.randn(BATCH, 16), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * BATCH)}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = NoiseSchedule("epsilon", alphas_cumprod=(1 - betas).cumprod(0))
    embeds = torch.randn(BATCH, 5, 16)

    def predict(x_t, timestep, control):
        return unet_predict(unet, controlnet, x_t, timestep, control, embeds, added)

    return unet, controlnet, vae(4, None), schedule, predict, torch.tensor([10, 500, 150])


def sd3():
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    controlnet = SD3ControlNetModel.from_transformer(transformer, num_layers=1, num_extra_conditioning_channels=0)
    autoencoder, embeds, pooled = vae(4, 0.1), torch.randn(BATCH, 5, 16), torch.randn(BATCH, 16)

    def predict(x_t, timestep, control):
        latents = encode_control(autoencoder, control)
        return sd3_predict(transformer, controlnet, x_t, timestep, latents, embeds, pooled)

    schedule = NoiseSchedule("flow_prediction", shift=3.0)
    return transformer, controlnet, autoencoder, schedule, predict, torch.tensor([100.0, 800.0, 300.0])


def flux():
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    controlnet = FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    autoencoder, embeds, pooled = vae(4, 0.1), torch.randn(BATCH, 5, 16), torch.randn(BATCH, 16)

    def predict(x_t, timestep, control):
        latents = encode_control(autoencoder, control)
        return flux_predict(transformer, controlnet, x_t, timestep, latents, embeds, pooled, torch.ones(BATCH))

    schedule = NoiseSchedule("flow_prediction", shift=3.0)
    return transformer, controlnet, autoencoder, schedule, predict, torch.tensor([100.0, 800.0, 300.0])


@pytest.mark.parametrize("family", [sdxl, sd3, flux])
def test_training_steps(family):
    torch.manual_seed(0)
    base, controlnet, autoencoder, schedule, predict, timestep = family()
    for module in (base, autoencoder):
        module.requires_grad_(False).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    condition = build_condition("tests.toy_conditions:Red")
    targets = torch.rand(BATCH, 16, 16)
    x_0 = encode_control(autoencoder, torch.rand(BATCH, 3, 16, 16))
    noise = torch.randn_like(x_0)
    rewarded = schedule.snr(timestep) >= 3.06  # SD's t <= 200, for any family
    assert rewarded.tolist() == [True, False, True]

    def decode(latents):
        config = autoencoder.config
        images = autoencoder.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
        return (images / 2 + 0.5).clamp(0, 1)

    controlnet.train().requires_grad_(True)
    optimizer = torch.optim.Adam(controlnet.parameters(), lr=1e-2)
    history = []
    for _ in range(4):
        losses = controlnet_losses(
            lambda x_t, t: predict(x_t, t, condition.control(targets)),
            schedule,
            x_0,
            noise,
            timestep,
            rewarded,
            decode,
            lambda images, rows: condition(images, targets[rows]),
        )
        assert (losses.reward > 0).tolist() == [True, False, True]
        loss = losses.diffusion.mean() + losses.reward.sum() / 2
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[-1] < history[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_packing_is_diffusers():
    latents = torch.randn(2, 4, 6, 8)
    expected = FluxControlNetPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), expected)
    assert torch.equal(unpack(expected, 6, 8), latents)
    ids = FluxControlNetPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(patch_ids(3, 4), ids)
