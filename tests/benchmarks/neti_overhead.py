"""What a concept costs at sampling time: text work over network work, counted and measured.

    python tests/benchmarks/neti_overhead.py

Counted: FLOPs of one denoising step for 8 images of one prompt with guidance at SD 1.5's shapes (no weights needed).
Measured: the emoji world, the same prompt with a concept and with a word, new and seen before, median of 5.
"""

import statistics
import time

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from alignkit.attention import text_layers
from alignkit.base import ARCHITECTURES, load_base
from alignkit.concepts import Concepts, Mapper, create

IMAGES = 8


@torch.no_grad()
def counted() -> None:
    path = ARCHITECTURES["sd15"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path, subfolder="unet"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(path, subfolder="text_encoder"))
        layers, length, width = len(text_layers(unet)), 77, unet.config.cross_attention_dim
        inputs = torch.empty(2 * IMAGES, 4, 64, 64), 1, torch.empty(2 * IMAGES, length, width)
        with FlopCounterMode(display=False) as network:
            unet(*inputs)
        with FlopCounterMode(display=False) as text:
            text_encoder(torch.zeros(layers, length, dtype=torch.long))
    mapper = Mapper(layers, [width], [0.4])
    with FlopCounterMode(display=False) as small:
        mapper(torch.zeros(layers), torch.arange(layers))
    work = text.get_total_flops() + small.get_total_flops()
    whole = network.get_total_flops()
    print(f"SD 1.5, {IMAGES} images of one prompt, a step: network {whole / 1e12:.2f} TFLOP, text for {layers} layers")
    print(f"{work / 1e12:.3f} TFLOP = {100 * work / whole:.1f} %; of a prompt that was seen before, none")


def measured(steps: int = 10) -> None:
    base = load_base("emoji")
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    concept = create("neti", base, "<thing>", "animal")

    def seconds(prompt: str) -> float:
        start = time.perf_counter()
        pipe(prompt, num_images_per_prompt=IMAGES, num_inference_steps=steps, output_type="latent")
        return time.perf_counter() - start

    seconds("a cat")
    plain, new, seen = [], [], []
    for _ in range(5):  # interleaved, so that what else the machine does falls on all of them
        plain.append(seconds("a cat"))
        with Concepts([concept]).applied(pipe):
            new.append(seconds("a <thing>"))
            seen.append(seconds("a <thing>"))
    plain, new, seen = map(statistics.median, (plain, new, seen))
    print(
        f"emoji world, {IMAGES} images, {steps} steps: {plain:.2f} s; a new prompt {100 * (new / plain - 1):+.1f} %, "
    )
    print(f"one that was seen {100 * (seen / plain - 1):+.1f} %")


if __name__ == "__main__":
    counted()
    measured()
