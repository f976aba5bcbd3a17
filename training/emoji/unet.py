"""Train the emoji world's U-Net on the frozen text tower and autoencoder, and put the base model together.

    python training/emoji/unet.py
    python training/emoji/unet.py --warm_start --steps 20000      # train the shipped weights on

Epsilon prediction on SD's noise schedule, a tenth of the captions dropped for classifier-free guidance, the loss
weighted by min-SNR (Hang et al. 2023, eq. 4, gamma 5).
"""

from argparse import ArgumentParser

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from alignkit.emoji import WEIGHTS_DIR, captions, fit, scenes

BASE = WEIGHTS_DIR / "base"
BATCH_SIZE = 32
MIN_SNR_GAMMA = 5.0


def build_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 4,
        block_out_channels=(64, 128, 176),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=16,
        attention_head_dim=(2, 4, 4),  # diffusers reads this as the number of heads; at 16 x 16 more cost a tenth
    )


def build_scheduler() -> DDIMScheduler:
    """SD's schedule. Trailing steps, so that the last one still has work to do and gives a reward gradient."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def main(steps: int, warm_start: bool, seed: int = 31) -> None:
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder").float().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(BASE / "vae").float().requires_grad_(False)
    unet = build_unet(text_encoder.config.hidden_size)
    if warm_start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(BASE / "unet").float().state_dict())
    unet.set_attn_processor(AttnProcessor())  # on a CPU its backward takes half of the time of the fused kernel's
    compiled = torch.compile(unet)
    scheduler = build_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod
    world = scenes.World()

    @torch.no_grad()
    def make_batch(rng: np.random.Generator) -> dict:
        drawn = [world.draw(rng) for _ in range(BATCH_SIZE)]
        images = fit.to_float(np.stack([scenes.render(s).image for s in drawn]))
        texts = [captions.caption(s, rng) if rng.random() > 0.1 else "" for s in drawn]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moments = vae.encode(images * 2 - 1).latent_dist.parameters
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return {"moments": moments.half(), "input_ids": tokens.input_ids}

    def loss_fn(batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        mean, log_variance = batch["moments"].float().chunk(2, dim=1)
        x_0 = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        x_0 = x_0 * vae.config.scaling_factor
        with torch.no_grad():
            prompt_embeds = text_encoder(batch["input_ids"]).last_hidden_state
        noise = torch.randn(x_0.shape, generator=generator)
        # one timestep from each of B equal strata: less noise in the gradient than B independent ones
        strata = torch.randperm(len(x_0), generator=generator) + torch.rand(len(x_0), generator=generator)
        timestep = (strata / len(x_0) * scheduler.config.num_train_timesteps).long()
        prediction = compiled(scheduler.add_noise(x_0, noise, timestep), timestep, prompt_embeds).sample.float()
        error = (prediction - noise).square().mean((1, 2, 3))
        snr = alphas_cumprod[timestep] / (1 - alphas_cumprod[timestep])
        return (error * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean(), {"epsilon_mse": error.mean().item()}

    def save() -> None:
        half = fit.halves(unet)
        pipe = StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=half, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        half.save_pretrained(BASE / "unet")
        scheduler.save_pretrained(BASE / "scheduler")
        pipe.save_config(BASE)

    # a short average: one over 2,000 steps lagged behind the falling learning rate and drew worse than the last weights
    fit.fit(
        "unet", unet, loss_fn, make_batch, save,
        steps=steps, learning_rate=6e-4, muon_learning_rate=2e-3, cooldown=0.5, seed=seed, ema_decay=0.99,
        save_every=500, distinct_batches=3000,
    )  # fmt: skip


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument(
        "--warm_start", action="store_true", help="where there is no checkpoint, from the shipped weights"
    )
    args = parser.parse_args()
    main(args.steps, args.warm_start)
