"""SD 1.x, SD 2.x and the emoji world with LoRAs, a ControlNet, concepts and AlignIT, as one diffusers pipeline.

    pipe = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        custom_pipeline="pipelines/stable_diffusion.py",
        trust_remote_code=True,  # this file's
        controlnet=ControlNetModel.from_pretrained("runs/controlnetpp/depth"),
        loras={"aesthetic": "runs/alignprop/emoji"},
        concepts=["runs/thing"],
    )
    pipe("a <thing> left of a tree", control_image=depth, alignit=True, lora_scale={"aesthetic": 0.7}, seed=3).images

What drawing does is `alignkit.compose`, which calls the stock pipeline. All else is the stock class's: schedulers,
offloading, callbacks, `save_pretrained`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from alignkit.composable import Composable


class StableDiffusionComposedPipeline(Composable, StableDiffusionPipeline):
    """`loras` and `concepts` as of `alignkit.compose`; the call as of `alignkit.composed.Composed`."""

    _optional_components = [*StableDiffusionPipeline._optional_components, "controlnet"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        controlnet: ControlNetModel | None = None,
        requires_safety_checker: bool = False,
        loras: Mapping[str, Any] | None = None,
        concepts: Sequence[Any] | Mapping[str, Any] | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(controlnet=controlnet)
        self._compose(controlnet, loras, concepts)

    def _stock(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=self.safety_checker,
            feature_extractor=self.feature_extractor,
            image_encoder=self.image_encoder,
            requires_safety_checker=self.config["requires_safety_checker"],
        )
