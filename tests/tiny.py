"""A text-to-image model of a few thousand parameters, to be loaded with `random_init`."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def save_tiny_model(folder: Path) -> str:
    """A diffusers folder of configs: latents of 8 x 8 with a VAE factor of 2, 40 tokens."""
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    ).save_config(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).save_config(folder / "vae")
    CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=40,
        projection_dim=16,
    ).save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return str(folder)


def tiny_sdxl(tiny: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    """Both text encoders, pooled text and time ids; VAE, tokenizer and scheduler are those of the tiny model."""

    def config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tiny.tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=40, projection_dim=10, eos_token_id=2,
        )  # fmt: skip

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), cross_attention_dim=20, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=tiny.vae, unet=unet, scheduler=tiny.scheduler, tokenizer=tiny.tokenizer, tokenizer_2=tiny.tokenizer,
        text_encoder=CLIPTextModel(config(8)).eval(), text_encoder_2=CLIPTextModelWithProjection(config(12)).eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
