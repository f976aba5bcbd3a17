"""Pictures as a generator would spoil them, so that judges trained on exact scenes also read generated ones."""

from pathlib import Path

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor


class Degrader:
    """Of a batch, half goes through the VAE and back, with noise on some latents; then some are blurred, some noisy."""

    def __init__(self, vae: str | Path):
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_pretrained(vae).float().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, rng: np.random.Generator, blur: bool = True) -> Tensor:
        """images [B, 3, H, W] in [0, 1], and the same back."""
        images = images.clone()
        through_vae = torch.from_numpy(rng.random(len(images)) < 0.5)
        if through_vae.any():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                latents = self.vae.encode(images[through_vae] * 2 - 1).latent_dist.mode()
                spread = latents.std() * torch.from_numpy(rng.choice([0.0, 0.0, 0.1, 0.25], len(latents))).view(
                    -1, 1, 1, 1
                )
                latents = latents + spread.to(latents.dtype) * torch.from_numpy(rng.standard_normal(latents.shape)).to(
                    latents.dtype
                )
                images[through_vae] = self.vae.decode(latents).sample.float() / 2 + 0.5
        for i in np.flatnonzero(rng.random(len(images)) < 0.2 * blur):
            sigma = float(rng.uniform(0.3, 1.2))
            images[i] = gaussian_blur2d(images[None, i], (5, 5), (sigma, sigma))[0]
        for i in np.flatnonzero(rng.random(len(images)) < 0.2):
            images[i] += float(rng.uniform(0.01, 0.08)) * torch.from_numpy(rng.standard_normal(images[i].shape)).float()
        return images.clamp(0, 1)
