"""Train the emoji world's autoencoder: 64 x 64 pixels to 16 x 16 latents of 4 channels.

    python training/emoji/vae.py --steps 3000

A loss on all pixels alike spends the model on flat backgrounds and smears the sprites, so the sprites' pixels count
ninefold. No adversary and no perceptual network: L1, L2 and the L1 of image gradients.
"""

from argparse import ArgumentParser

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from alignkit.emoji import WEIGHTS_DIR, fit, scenes

WORLD = scenes.World(tiers=("named", "known"), named_share=0.45, overlap=0.3, with_held_out=True)


def make_batch(rng: np.random.Generator, batch_size: int = 16) -> dict:
    rendered = [scenes.render(WORLD.draw(rng)) for _ in range(batch_size)]
    return {
        "images": fit.to_float(np.stack([r.image for r in rendered])),
        "on_sprite": torch.from_numpy(np.stack([r.class_map > 0 for r in rendered]))[:, None].float(),
    }


def main(steps: int, seed: int = 11) -> None:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
    )

    def loss_fn(batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        x = batch["images"] * 2 - 1
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample(generator=generator)).sample.float()
        weight = 1 + 8 * F.max_pool2d(batch["on_sprite"], 3, 1, 1)
        weight = weight / weight.mean()
        error = reconstruction - x
        gradients = sum(
            (weight[..., : d.shape[-2], : d.shape[-1]] * d.abs()).mean()
            for d in (error.diff(dim=-1), error.diff(dim=-2))
        )
        mse = (weight * error**2).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (weight * error.abs()).mean() + 2 * mse + 0.5 * gradients + 1e-4 * kl
        sprite_mse = ((error / 2) ** 2 * batch["on_sprite"]).sum() / (3 * batch["on_sprite"].sum())
        return loss, {"sprite_psnr": -10 * sprite_mse.log10().item(), "kl": kl.item()}

    def save() -> None:
        with torch.no_grad():
            latents = vae.encode(make_batch(np.random.default_rng(0), 256)["images"] * 2 - 1).latent_dist.sample()
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        fit.halves(vae).save_pretrained(WEIGHTS_DIR / "base" / "vae")

    fit.fit("vae", vae, loss_fn, make_batch, save, steps=steps, learning_rate=1.5e-3, seed=seed, weight_decay=1e-4)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    main(parser.parse_args().steps)
