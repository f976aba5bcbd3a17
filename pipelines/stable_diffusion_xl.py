"""SDXL with LoRAs, a ControlNet, concepts and AlignIT, as one diffusers pipeline.

    pipe = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0",
        custom_pipeline="pipelines/stable_diffusion_xl.py",
        trust_remote_code=True,  # this file's
        loras={"aesthetic": "runs/alignprop/sdxl"},
        concepts=["runs/thing"],
    )
    pipe("a <thing> left of a tree", alignit=True, lora_scale={"aesthetic": 0.7}, seed=3).images

What drawing does is `alignkit.compose`, which calls the stock pipeline. All else is the stock class's: schedulers,
offloading, callbacks, `save_pretrained`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from alignkit.composable import Composable


class StableDiffusionXLComposedPipeline(Composable, StableDiffusionXLPipeline):
    """`loras` and `concepts` as of `alignkit.compose`; the call as of `alignkit.composed.Composed`."""

    _optional_components = [*StableDiffusionXLPipeline._optional_components, "controlnet"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        controlnet: ControlNetModel | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        loras: Mapping[str, Any] | None = None,
        concepts: Sequence[Any] | Mapping[str, Any] | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(controlnet=controlnet)
        self._compose(controlnet, loras, concepts)

    def _stock(self) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=self.scheduler,
            image_encoder=self.image_encoder,
            feature_extractor=self.feature_extractor,
            force_zeros_for_empty_prompt=self.config["force_zeros_for_empty_prompt"],
            add_watermarker=self.watermark is not None,
        )
