"""What a concept costs at sampling time: text work over network work, counted and measured.

    python tests/benchmarks/neti_overhead.py

Counted: FLOPs of one denoising step of one prompt with guidance at SD 1.5's shapes (no weights needed), for 8 images
and for one, and of what AlignIT needs of the text. A prompt that was seen before costs no text: its contexts are kept
(tests/test_concepts.py counts the calls).
Measured: CPU time on the emoji world, the same prompt with a concept and with a word, new and seen before, median of 5.
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
WINDOW, PREFIX = 77, 5  # tokens of the whole prompt; of AlignIT's "a photo of <thing>", up to the concept


@torch.no_grad()
def counted(images: int, length: int) -> tuple[int, int]:
    """FLOPs of a step at SD 1.5's shapes, with guidance: of the network, and of `length` tokens for all its layers."""
    path = ARCHITECTURES["sd15"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path, subfolder="unet"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(path, subfolder="text_encoder"))
        layers, width = len(text_layers(unet)), unet.config.cross_attention_dim
        inputs = torch.empty(2 * images, 4, 64, 64), 1, torch.empty(2 * images, WINDOW, width)
        with FlopCounterMode(display=False) as network:
            unet(*inputs)
        with FlopCounterMode(display=False) as text:
            text_encoder(torch.zeros(layers, length, dtype=torch.long))
    mapper = Mapper(layers, [width], [0.4])
    with FlopCounterMode(display=False) as small:
        mapper(torch.zeros(layers), torch.arange(layers))
    return network.get_total_flops(), text.get_total_flops() + small.get_total_flops()


def measured(steps: int = 10) -> None:
    base = load_base("emoji")
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    concept = create("neti", base, "<thing>", "animal")

    def seconds(prompt: str) -> float:
        start = time.process_time()
        pipe(prompt, num_images_per_prompt=IMAGES, num_inference_steps=steps, output_type="latent")
        return time.process_time() - start

    seconds("a cat")
    plain, new, seen = [], [], []
    for _ in range(5):  # interleaved, so that what else the machine does falls on all of them
        plain.append(seconds("a cat"))
        with Concepts([concept]).applied(pipe):
            new.append(seconds("a <thing>"))
            seen.append(seconds("a <thing>"))
    plain, new, seen = map(statistics.median, (plain, new, seen))
    new, seen = (100 * (seconds / plain - 1) for seconds in (new, seen))
    print(f"emoji world, {IMAGES} images, {steps} steps: {plain:.2f} s; new {new:+.1f} %, seen before {seen:+.1f} %")


if __name__ == "__main__":
    for images, length, name in ((IMAGES, WINDOW, "NeTI"), (1, WINDOW, "NeTI"), (1, PREFIX, "NeTI under AlignIT")):
        network, text = counted(images, length)
        print(
            f"SD 1.5, {images} of one prompt, a step: network {network / 1e12:.2f} TFLOP, text of {name} "
            f"({length} tokens) {text / 1e12:.3f} TFLOP = {100 * text / network:.1f} %"
        )
    measured()
