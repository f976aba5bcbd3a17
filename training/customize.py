"""Customisers: a model learns one concept from 3 to 8 images. What AlignIT is measured on, and what it plugs into.

- `method: lora`: DreamBooth with a LoRA of the U-Net, also SDXL's. Ruiz et al., "DreamBooth", 2022, arXiv 2208.12242.
- `method: custom_diffusion`: W_k and W_v of cross-attention and the embedding of one new token. Kumari et al.,
  "Multi-Concept Customization of Text-to-Image Diffusion", 2022, arXiv 2212.04488.
- `method: dreambooth`: the whole U-Net. The text encoder stays as it is, as in DreamBooth's own text.

    repeat   draw images x of the concept and templates c; "a photo of <thing> dog"
             loss = |eps - eps_theta(x_t, t, c)|^2
             with prior preservation, + prior_loss_weight times the same on images of the class, "a photo of dog", which
             the base itself drew before

Where the authors' codes differ, this follows the papers:
- Both losses are means over pixels, each with noise and timesteps of its own.
- Custom Diffusion: the first row of keys and values, the start token's, keeps its gradient to itself (`detach`), as in
  the authors' code. Their random rescaling of images with "zoomed in" captions, and training on real images of the
  class from LAION, are left out: class images are the base's own, as in DreamBooth, or yours (`class_data_dir`).
- The new token is a row beside the embedding table, so no row of the base ever moves.

    accelerate launch training/customize.py --config configs/customize/emoji_lora.yaml
    torchrun --nproc_per_node 2 training/customize.py --config configs/customize/emoji_custom_diffusion.yaml
    python training/customize.py --config configs/customize/sd15_lora.yaml --dry-run --random_init --shrink 4
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers.utils import numpy_to_pil
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit.artifacts import atomic, load_json, read_events, remove, save_json, save_lora, save_strip, write_card
from alignkit.base import Base, add_lora, require_finite
from alignkit.config import DiffusionConfig, LoraConfig, command, free, to_dict
from alignkit.customized import (
    cross_attention,
    fingerprint,
    save_concept,
    save_custom_diffusion,
    save_embeddings,
)
from alignkit.data import load_image, read_concept_images
from alignkit.families import Condition
from alignkit.noise import draw_noise
from alignkit.run import Run

# What a condition's texts are called by the stock pipelines, which make the rest of it themselves.
PIPELINE_TEXTS = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
TOKEN = "token_embedding"  # the name of the new row among the trained parameters
CLASS_IMAGES_DEPEND_ON = (
    "pretrained_model_name_or_path", "base_config", "random_init", "shrink", "mixed_precision", "class_noun",
    "templates", "num_class_images", "resolution", "num_inference_steps", "guidance_scale",
)  # fmt: skip


@dataclass
class Config(DiffusionConfig):
    method: Literal["lora", "custom_diffusion", "dreambooth"] = "lora"
    """What is trained: a LoRA, W_k and W_v with a new token, or the whole U-Net."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter of method lora."""
    instance_data_dir: str = ""
    """Folder with the images of the concept, 3 to 8."""
    placeholder_token: str = "<thing>"
    """Stands for the concept: a new token with custom_diffusion, any rare word otherwise."""
    class_noun: str = ""
    """What it is, such as "dog". Prompts say "<thing> dog"; the new token starts as the mean of its embeddings."""
    templates: list[str] = field(default_factory=lambda: ["a photo of {}"])
    """Training prompts; {} is "<thing> dog", and "dog" for the images of the class."""
    random_flip: bool = True
    """Mirror images with probability 1/2."""
    resolution: int | None = None
    """Side of the images in pixels; null is the base's own."""
    gradient_checkpointing: bool = free(False)
    """Compute the U-Net's blocks twice, for less memory."""

    with_prior_preservation: bool = True
    """Keep the class as it is, by images of it."""
    prior_loss_weight: float = 1.0
    """Weight of their loss."""
    class_data_dir: str | None = None
    """Folder with images of the class; null draws them with the base, into output_dir/class_images."""
    num_class_images: int = 100
    """How many are drawn."""

    validation_prompts: list[str] = field(default_factory=lambda: ["a photo of {}"])
    """Drawn at each validation; {} is "<thing> dog"."""
    num_validation_images: int = 4
    """Image i is of prompt i (starting over at the end) and seed i."""
    num_inference_steps: int = 25
    """DDIM steps of validation and class images."""
    guidance_scale: float = 7.5
    """Of validation and class images."""
    sample_batch_size: int = free(8)
    """Images drawn at once."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_class_images", "num_validation_images", "num_inference_steps", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("instance_data_dir", "placeholder_token", "class_noun"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected a value, got none")
        for name in ("templates", "validation_prompts"):
            wrong = [text for text in getattr(self, name) if text.count("{}") != 1]
            if wrong or not getattr(self, name):
                raise ValueError(f"{name}: expected texts with one {{}} for the concept, got {wrong or 'none'}")
        if not self.prior_loss_weight > 0:
            raise ValueError(
                f"prior_loss_weight: expected above 0, got {self.prior_loss_weight}; to do without the images of the "
                "class, set with_prior_preservation to false"
            )

        if self.quantization != "no":
            raise ValueError(
                f"quantization: expected 'no', as a concept belongs to the weights of its base, which AlignIT takes "
                f"again, got {self.quantization!r}"
            )
        if self.method == "dreambooth" and self.mixed_precision != "no":
            raise ValueError(
                f"mixed_precision: expected 'no' with method dreambooth, which trains all of the U-Net in float32, got "
                f"{self.mixed_precision!r}; to save memory, train a LoRA"
            )

    @property
    def phrase(self) -> str:
        return f"{self.placeholder_token} {self.class_noun}"


def train(cfg: Config) -> Path:
    """Runs or resumes the training. Returns its folder, with the weights, concept.json and a card."""
    run = Run(cfg, "customize")
    base = run.load_base()
    base.require_family("StableDiffusionPipeline", *["StableDiffusionXLPipeline"] * (cfg.method == "lora"))
    base_fingerprint = fingerprint(base.unet)
    if cfg.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    side = min(base.image_size(cfg.resolution, cfg.resolution))
    instance_images = [load_image(path, side) for path in image_files(cfg.instance_data_dir, side)]
    text = Text(base, cfg)
    base.check_prompts([t.replace("{}", p) for t in cfg.templates for p in (cfg.phrase, cfg.class_noun)])
    base.check_prompts([prompt.replace("{}", cfg.phrase) for prompt in cfg.validation_prompts])

    instances = Examples(encode(base, instance_images), [t.replace("{}", cfg.phrase) for t in cfg.templates])
    classes = None
    if cfg.with_prior_preservation:
        class_latents = encode(base, class_images(run, cfg, base, side))
        prompts = [t.replace("{}", cfg.class_noun) for t in cfg.templates]
        classes = Examples(class_latents, prompts, drawn=cfg.class_data_dir is None)
    before = draw(cfg, base, text, cfg.class_noun)

    params = trained_parameters(cfg, base, text)
    run.prepare(params)
    if run.position == 0:
        run.show(0, "instance_images", torch.stack(instance_images))
        run.show(0, "base", before, validation_prompts(cfg, cfg.class_noun))

    for step in run.steps():
        base.unet.train()  # for the LoRA's dropout
        parts = []
        for indices in run.micro_batches(step):
            instance_loss = denoising_loss(run, cfg, base, text, instances, step, indices, "instance")
            losses = {"instance_loss": instance_loss}
            loss = instance_loss
            if classes:
                losses["prior_loss"] = denoising_loss(run, cfg, base, text, classes, step, indices, "class")
                loss = loss + cfg.prior_loss_weight * losses["prior_loss"]
            run.backward(loss, **losses)
            parts.append({"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}})
        grad_norm = run.update()
        run.log(step, grad_norm=grad_norm, **{name: torch.cat([p[name] for p in parts]) for name in parts[0]})
        if run.every(cfg.validation_steps, step):
            with run.averaged():
                run.show(step, "validation", draw(cfg, base, text, cfg.phrase), validation_prompts(cfg, cfg.phrase))

    with run.averaged():
        if run.is_main:
            export(run, cfg, base, text, base_fingerprint, before, draw(cfg, base, text, cfg.phrase))
    run.finish()
    return run.output_dir


# What is trained


def trained_parameters(cfg: Config, base: Base, text: "Text") -> dict[str, nn.Parameter]:
    """The float32 parameters of the method, by name; all others stay frozen."""
    if cfg.method == "lora":
        c = cfg.lora
        return add_lora(base.unet, c.rank, c.lora_alpha, c.target_modules, c.dropout, cfg.seed)
    if cfg.method == "dreambooth":
        return dict(base.unet.requires_grad_(True).named_parameters())
    params = {TOKEN: text.row}
    for name, attention in cross_attention(base.unet).items():
        for part in ("to_k", "to_v"):
            projection = getattr(attention, part)
            projection.float().requires_grad_(True)
            projection.register_forward_pre_hook(lambda module, args: (args[0].float(),))
            projection.register_forward_hook(finish_projection(base.unet.dtype))
            params[f"{name}.{part}.weight"] = projection.weight
    return params


def finish_projection(dtype: torch.dtype):
    """Back to the U-Net's dtype, with the start token's row [:, :1] cut from the gradient."""

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1).to(dtype)

    return hook


class Text:
    """Prompts to conditions. With custom_diffusion the placeholder is a new token, whose `row` [1, D] is trained."""

    def __init__(self, base: Base, cfg: Config):
        self.base, self.row, self.new_id = base, None, -1
        self.side = min(base.image_size(cfg.resolution, cfg.resolution))
        if cfg.method != "custom_diffusion":
            return
        table = base.text_encoder.get_input_embeddings().weight
        noun = base.tokenizer(cfg.class_noun, add_special_tokens=False).input_ids
        if len(base.tokenizer(cfg.placeholder_token, add_special_tokens=False).input_ids) < 2:
            raise ValueError(
                f"placeholder_token: {cfg.placeholder_token!r} is a token of {base.name} already; choose another, such "
                "as <thing>"
            )
        base.tokenizer.add_tokens(cfg.placeholder_token)
        self.new_id = base.tokenizer.convert_tokens_to_ids(cfg.placeholder_token)
        self.row = nn.Parameter(table[noun].float().mean(0, keepdim=True))

    def encode(self, prompts: list[str], negative: bool = False) -> Condition:
        """As `Base.condition`, with the row's gradient."""
        if self.row is None:
            return self.base.condition(prompts, self.side, self.side, negative)
        self.base.check_prompts(prompts)
        tokenizer, text_encoder = self.base.tokenizer, self.base.text_encoder
        ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        ids = ids.input_ids.to(text_encoder.device)
        is_new = ids == self.new_id

        def place(module: nn.Module, args: tuple, embeds: Tensor) -> Tensor:
            return torch.where(is_new[..., None], self.row.to(embeds.dtype), embeds)

        # a hook, since CLIPTextModel takes no inputs_embeds; and no larger table, which would draw random rows
        handle = text_encoder.get_input_embeddings().register_forward_hook(place)
        try:
            return {"encoder_hidden_states": text_encoder(ids.masked_fill(is_new, 0))[0]}
        finally:
            handle.remove()


# The loss


@dataclass
class Examples:
    """Latents of the images and of their mirror images, [2, N, C, h, w], and the prompts that go with any of them.

    `drawn`: images of the base, of which the i-th was drawn by prompt i, starting over at the end, and goes with that.
    """

    latents: Tensor
    prompts: list[str]
    drawn: bool = False

    def draw(self, generator: torch.Generator, flip: bool) -> tuple[Tensor, str]:
        view = int(torch.randint(2, (), generator=generator)) if flip else 0
        i = int(torch.randint(self.latents.shape[1], (), generator=generator))
        number = i if self.drawn else int(torch.randint(len(self.prompts), (), generator=generator))
        return self.latents[view, i], self.prompts[number % len(self.prompts)]


@torch.no_grad()
def encode(base: Base, images: Iterable[Tensor]) -> Tensor:
    """Of [3, H, W] each, [2, N, C, h, w] on the device: mirrored latents are not the latents of mirrored images."""
    views = [[], []]
    for image in images:  # one at a time: hundreds of images of SDXL's size are gigabytes
        for latents, view in zip(views, (image, image.flip(-1)), strict=True):
            latents.append(base.encode(view[None].to(base.vae.device)).float())
    return torch.stack([torch.cat(latents) for latents in views])


def denoising_loss(
    run: Run, cfg: Config, base: Base, text: Text, examples: Examples, step: int, indices: list[int], tag: str
) -> Tensor:
    """|target - output|^2 of one example per index, at a timestep of its own, [b]."""
    x_0, noise, timestep, prompts = [], [], [], []
    for index in indices:
        generator = run.generator(step, index, tag)
        latents, prompt = examples.draw(generator, cfg.random_flip)
        x_0.append(latents)
        noise.append(draw_noise(latents.shape, generator, cfg.noise_offset))
        timestep.append(torch.randint(base.schedule.num_train_timesteps, (), generator=generator))
        prompts.append(prompt)
    x_0, noise, timestep = torch.stack(x_0), torch.stack(noise).to(run.device), torch.stack(timestep).to(run.device)
    output = base.forward(base.schedule.add_noise(x_0, noise, timestep), timestep, text.encode(prompts))
    target = base.schedule.target(x_0, noise, timestep)
    loss = F.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    return loss * base.schedule.min_snr_weight(timestep, cfg.snr_gamma).to(loss) if cfg.snr_gamma else loss


# Pictures


def image_files(folder: str | Path, side: int) -> list[Path]:
    """Those that can be read, in the order of their names. What is odd but harmless is warned of."""
    images, odd = read_concept_images(folder, side)
    if any(image.caption or image.mask for image in images):
        odd = [*odd, f"{folder} has captions or masks, which training/neti.py reads: here templates are the captions."]
    for line in odd:
        warnings.warn(line, stacklevel=2)
    return [image.path for image in images]


def class_images(run: Run, cfg: Config, base: Base, side: int) -> Iterable[Tensor]:
    """The user's, or the base's own, drawn once for these settings; [3, H, W] each."""
    if cfg.class_data_dir:
        return (load_image(path, side) for path in image_files(cfg.class_data_dir, side))
    if cfg.dry_run:
        return torch.cat([images for _, images in drawn_of_class(cfg, base, side, min(2, cfg.num_class_images))])
    folder, partial = run.output_dir / "class_images", run.output_dir / "class_images.partial"
    if run.is_main:
        config = to_dict(cfg)
        settings = {name: config[name] for name in CLASS_IMAGES_DEPEND_ON}
        for left in (folder, partial):
            drawn_by = left / "settings.json"
            if drawn_by.is_file() and load_json(drawn_by) != settings:
                remove(left)  # of a run that ended before its first checkpoint, which would have refused this one
        names = [f"{i:04d}.png" for i in range(cfg.num_class_images)]
        if folder.is_dir() and not all((folder / name).is_file() for name in names):
            folder.rename(partial)  # somebody took one out
        if not folder.is_dir():
            partial.mkdir(parents=True, exist_ok=True)
            save_json(settings, partial / "settings.json")
            files = [partial / name for name in names]
            done = next((i for i, file in enumerate(files) if not file.is_file()), len(files))
            for start, images in drawn_of_class(cfg, base, side, cfg.num_class_images, done):
                for file, picture in zip(files[start:], numpy_to_pil(images.permute(0, 2, 3, 1).numpy()), strict=False):
                    with atomic(file) as temporary:
                        picture.save(temporary, format="PNG")
            partial.rename(folder)
    run.accelerator.wait_for_everyone()
    return (load_image(folder / f"{i:04d}.png", side) for i in range(cfg.num_class_images))


def drawn_of_class(
    cfg: Config, base: Base, side: int, number: int, done: int = 0
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """(number of the first, images [n, 3, H, W]) by batches of `sample_batch_size`, from the one that `done` cut."""
    negative = base.condition([""], side, side, negative=True)
    for start in range(done // cfg.sample_batch_size * cfg.sample_batch_size, number, cfg.sample_batch_size):
        numbers = range(start, min(start + cfg.sample_batch_size, number))
        prompts = [cfg.templates[i % len(cfg.templates)].replace("{}", cfg.class_noun) for i in numbers]
        yield start, sample(cfg, base, base.condition(prompts, side, side), negative, start)


def validation_prompts(cfg: Config, phrase: str) -> list[str]:
    return [
        cfg.validation_prompts[i % len(cfg.validation_prompts)].replace("{}", phrase)
        for i in range(cfg.num_validation_images)
    ]


@torch.no_grad()
def draw(cfg: Config, base: Base, text: Text, phrase: str) -> Tensor:
    """The validation's images [N, 3, H, W] in [0, 1], of the concept or of its class."""
    return sample(cfg, base, text.encode(validation_prompts(cfg, phrase)), text.encode([""], negative=True))


@torch.no_grad()
def sample(cfg: Config, base: Base, condition: Condition, negative: Condition, first_seed: int = 0) -> Tensor:
    """An image per row of the condition from the stock pipeline, image i with seed first_seed + i, on the CPU.

    Raises FloatingPointError where one is not finite: saved, it would be black, and be learnt as what the class is.
    """
    base.unet.eval()
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    side = min(base.image_size(cfg.resolution, cfg.resolution))
    images, total = [], len(condition["encoder_hidden_states"])
    for start in range(0, total, cfg.sample_batch_size):
        number = min(cfg.sample_batch_size, total - start)
        texts = {}
        for name, argument in PIPELINE_TEXTS.items():
            if name in condition:
                texts[argument] = condition[name][start : start + number]
                texts[f"negative_{argument}"] = negative[name].expand_as(texts[argument])
        images.append(
            pipe(
                **texts,
                height=side,
                width=side,
                num_inference_steps=cfg.num_inference_steps,
                guidance_scale=cfg.guidance_scale,
                generator=[torch.Generator().manual_seed(first_seed + start + i) for i in range(number)],
                output_type="pt",
            ).images.cpu()
        )
    return require_finite(torch.cat(images), base.unet.dtype).float().clamp(0, 1)


def export(run: Run, cfg: Config, base: Base, text: Text, base_fingerprint: str, before: Tensor, after: Tensor) -> None:
    """The weights in diffusers' formats, concept.json, a picture, the curves, and a card."""
    folder = run.output_dir
    if cfg.method == "lora":
        weights, usage = save_lora(folder, base.unet), "pipe.load_lora_weights(folder)"
    elif cfg.method == "dreambooth":
        weights = folder / "unet"
        remove(weights)  # of the same run, finished before
        with atomic(weights) as temporary:
            base.unet.save_pretrained(temporary)
        usage = 'pipe.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")'
    else:
        weights = save_custom_diffusion(folder, base.unet)
        embeddings = save_embeddings(folder, {cfg.placeholder_token: text.row})
        usage = (
            f'pipe.unet.load_attn_procs(folder, weight_name="{weights.name}", _pipeline=pipe)\n'
            f'pipe.load_textual_inversion(folder, weight_name="{embeddings.name}")'
        )
    save_concept(
        folder,
        method=cfg.method,
        phrase=cfg.phrase,
        class_noun=cfg.class_noun,
        dummy=cfg.templates[0],
        base_model=cfg.pretrained_model_name_or_path,
        base_fingerprint=base_fingerprint,
    )
    save_strip(folder / "before_after.png", [before, after])
    columns = "\n".join(f"{i + 1}. {p} (seed {i})" for i, p in enumerate(validation_prompts(cfg, cfg.phrase)))
    write_card(
        folder,
        title=f"{cfg.phrase}, {cfg.method} of {cfg.pretrained_model_name_or_path}",
        description=(
            f"Trained by `training/customize.py` with method {cfg.method}. Say `{cfg.phrase}` in a prompt.\n\n"
            f"```python\n{usage}\n```\n\n"
            f"Above, the base draws `{cfg.class_noun}` there; below, the concept; the columns:\n\n{columns}"
        ),
        base_model=cfg.pretrained_model_name_or_path,
        config=to_dict(cfg),
        events=read_events(folder / "events.jsonl"),
        pictures=[folder / "before_after.png"],
        tags=[cfg.method],
        instance_prompt=cfg.phrase,
    )
    print(
        f"finished\npicture: {folder / 'before_after.png'}\ncurves:  {folder / 'curves.png'}\nweights: {weights}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    command(Config, train, argv)


if __name__ == "__main__":
    main()
