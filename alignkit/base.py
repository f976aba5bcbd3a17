"""The base model: load it, freeze it, turn text and images into what the U-Net works on and back, add a LoRA.

Families so far: those that diffusers serves with `StableDiffusionPipeline`, that is SD 1.x, SD 2.x and the bundled
emoji world. All sizes come from the model's own configs.
"""

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from alignkit import emoji
from alignkit.noise import NoiseSchedule

# Diffusers folders without weights, for `random_init`. The Hub name is there so that a config meant for the real
# weights can be dry-run where they are not.
_SD15 = str(Path(__file__).parent / "architectures" / "sd15")
ARCHITECTURES = {"sd15": _SD15, "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15}


@dataclass
class Base:
    """A frozen text-to-image model, as `load_base` makes it.

    `scheduler` is the DDIM form of the model's own noise schedule, whatever sampler it came with: training
    differentiates DDIM, so pictures are drawn with it too. Images are [B, 3, H, W] in [0, 1], latents [B, C, h, w]
    in the U-Net's scale, prompt embeddings [B, S, D].
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    schedule: NoiseSchedule

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises ValueError for a prompt that is longer than the text encoder reads."""
        if isinstance(prompts, str):
            raise TypeError(f"Expected a list of prompts, got the string {prompts!r}. Pass [prompt].")
        max_length = self.tokenizer.model_max_length
        for prompt, ids in zip(prompts, self.tokenizer(prompts, verbose=False).input_ids, strict=True):
            if len(ids) > max_length:
                raise ValueError(
                    f"Prompt too long: {self.name} reads {max_length} tokens, this one has {len(ids)}. "
                    f"Shorten it: {prompt!r}"
                )

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Prompt embeddings [B, S, D], equal to `StableDiffusionPipeline.encode_prompt`, which cuts what is too long.

        Raises ValueError there, as `check_prompts`.
        """
        self.check_prompts(prompts)
        max_length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=max_length, return_tensors="pt")
        tokens = tokens.to(self.text_encoder.device)
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of images: the mode of the VAE's posterior, so that the same image always gives the same latents."""
        config = self.vae.config
        latents = self.vae.encode(2 * images.to(self.vae.dtype) - 1).latent_dist.mode()
        return (latents - (config.shift_factor or 0)) * config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents, float32, with gradient.

        The clamp to [0, 1] is straight-through: it would cut the gradient of saturated pixels, and a model that has
        learnt to saturate could never learn its way back.
        """
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
        images = self.vae.decode(latents).sample.float() / 2 + 0.5
        # The difference is exactly zero: the value is the clamped one to the last bit, and NaN stays NaN.
        return images.clamp(0, 1).detach() + (images - images.detach())

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a height x width image; the size the model was trained at unless told."""
        size = self.unet.config.sample_size
        default = (size, size) if isinstance(size, int) else tuple(size)
        factor = self.vae_scale_factor
        for pixels in (height, width):
            if pixels is not None and (pixels <= 0 or pixels % factor):
                raise ValueError(f"Image sides of {self.name} are multiples of {factor} pixels, got {pixels}.")
        h = default[0] if height is None else height // factor
        w = default[1] if width is None else width // factor
        return (self.unet.config.in_channels, h, w)

    def pipeline(self) -> StableDiffusionPipeline:
        """The stock pipeline over these very modules, with a scheduler of its own and no safety checker."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def load_base(
    pretrained_model_name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    random_init: bool = False,
    shrink: int = 1,
) -> Base:
    """Load a base model, frozen and in eval mode.

    `pretrained_model_name_or_path`: "emoji" (bundled), a diffusers folder, or a name on the Hub.
    `random_init`: random weights (always the same ones) from the config files alone, for trying out a config without
    the weights; "sd15" and its Hub name need no download then. `shrink` divides all widths, keeping every layer's name.
    Raises FileNotFoundError where there is no such model, ValueError for a family that is not supported.
    """
    if shrink < 1 or (shrink > 1 and not random_init):
        raise ValueError(f"shrink must be at least 1, and above 1 only with random_init, got {shrink}.")
    path = emoji.resolve(pretrained_model_name_or_path)
    if random_init:
        path = ARCHITECTURES.get(path, path)
    _check_family(path)
    if random_init:
        pipe = _random_pipeline(path, dtype, shrink)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.to(device).eval().requires_grad_(False)
    pipe.tokenizer.model_max_length = min(
        pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings
    )
    # clip_sample is DDIM's default, but a clamp to [-1, 1] is for models of pixels, not of latents.
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return Base(
        name=pretrained_model_name_or_path,
        unet=pipe.unet,
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        scheduler=scheduler,
        schedule=NoiseSchedule.from_scheduler(scheduler),
    )


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    lora_alpha: float,
    target_modules: list[str],
    lora_dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, torch.nn.Parameter]:
    """Add a LoRA (Hu et al. 2021) to a frozen U-Net; return its parameters by name, float32 in any U-Net.

    A ~ N(0, 1/rank^2) as diffusers' scripts draw it, B = 0, so the model's output is unchanged. A depends on `seed` and
    the names only, not on the device, the dtype or the global random state. `target_modules`: endings of module names.
    Raises ValueError for an ending that fits no module.
    """
    if getattr(unet, "peft_config", None):
        raise ValueError(f"This U-Net has an adapter already: {', '.join(unet.peft_config)}. Load the base anew.")
    names = [name for name, _ in unet.named_modules() if name]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, {name.rsplit(".", 1)[-1] for name in names}, n=1)
            raise ValueError(
                f"No module of the U-Net ends in {target!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=lora_alpha,
                target_modules=target_modules,
                lora_dropout=lora_dropout,
                init_lora_weights="gaussian",
            )
        )
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        p = parameters[name]
        p.data = p.data.float()
        if ".lora_A." in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) / rank)
    return parameters


def _check_family(path: str) -> None:
    problem = (
        f"No base model {path!r}: expected 'emoji', a diffusers folder (with model_index.json) or a Hub OWNER/NAME."
    )
    # Said at once, since asking the Hub for what cannot be there takes half a minute where there is no network.
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(problem)
    try:
        family = StableDiffusionPipeline.load_config(path)["_class_name"]
    except OSError as error:
        raise FileNotFoundError(f"{problem} {str(error).strip().splitlines()[0]}") from error
    if family != "StableDiffusionPipeline":
        raise ValueError(
            f"{path} is a {family}. Supported are StableDiffusionPipeline models: SD 1.x, SD 2.x and the emoji world."
        )


def _random_pipeline(path: str, dtype: torch.dtype, shrink: int) -> StableDiffusionPipeline:
    unet_config = UNet2DConditionModel.load_config(path, subfolder="unet")
    vae_config = AutoencoderKL.load_config(path, subfolder="vae")
    text_config = CLIPTextConfig.from_pretrained(path, subfolder="text_encoder").to_dict()
    if shrink > 1:
        unet_config |= _shrunk_blocks(unet_config, shrink)
        unet_config["cross_attention_dim"] = _narrow(unet_config["cross_attention_dim"], shrink)
        heads = unet_config.get("attention_head_dim", 8)  # diffusers' misnomer: a number of heads
        widths = unet_config["block_out_channels"]
        heads = heads if isinstance(heads, list | tuple) else [heads] * len(widths)
        unet_config["attention_head_dim"] = [math.gcd(h, width) for h, width in zip(heads, widths, strict=True)]
        vae_config |= _shrunk_blocks(vae_config, shrink)
        for key in ("hidden_size", "intermediate_size", "projection_dim"):
            text_config[key] = _narrow(text_config[key], shrink)
        text_config["num_attention_heads"] = math.gcd(text_config["num_attention_heads"], text_config["hidden_size"])
    # Asked for files that are not there, from_pretrained gives a tokenizer to which all letters are unknown.
    if not Path(path).is_dir() or (Path(path) / "tokenizer").is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    else:
        tokenizer = _toy_tokenizer()
        text_config |= {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = UNet2DConditionModel.from_config(unet_config)
        vae = AutoencoderKL.from_config(vae_config)
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
    for module in (unet, vae, text_encoder):
        torch.nn.Module.to(module, dtype)  # diffusers' own .to(dtype) warns about layers that these models do not have
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(path, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _narrow(width: int, shrink: int) -> int:
    """A multiple of 8, so that groups and heads still divide it."""
    return 8 * math.ceil(width / (8 * shrink))


def _shrunk_blocks(config: dict, shrink: int) -> dict:
    widths = [_narrow(width, shrink) for width in config["block_out_channels"]]
    return {"block_out_channels": widths, "norm_num_groups": math.gcd(config["norm_num_groups"], *widths)}


def _toy_tokenizer() -> CLIPTokenizer:
    """A real CLIPTokenizer without merges: every byte is a token, with and without the end of a word."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
