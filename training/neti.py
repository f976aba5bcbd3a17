"""NeTI: learn a concept from a few images as a small network of (timestep, U-Net layer); the base model stays as it is.

Alaluf, Richardson, Metzer & Cohen-Or, "A Neural Space-Time Representation for Text-to-Image Personalization", 2023,
arXiv 2305.15391.

    repeat   draw an image x_0, a template "a photo of a <thing>", a timestep t and noise
             for every layer l: the mapper gives <thing>'s token embedding and bypass at (t, l), its last hidden
             units from a random u on set to zero (nested dropout); the text encoder makes the layer's keys and values
             one AdamW step on the mapper along the gradient of |eps - eps_theta(x_t, t, keys, values)|^2

Textual Inversion and P+ are the same loop with a plain vector in the mapper's place: `method: textual_inversion` learns
one for all layers, `method: p_plus` one for each.

Where the authors' code differs from the paper, or has a defect, this is what is done:
- The token vector gets the super-category's norm, as in the paper (`mapper.norm_mode: split`). Their code normalises
  token and bypass as one vector, so that the token ends up with 0.7 of it (`joint`).
- The learning rate is what the config says. Theirs is multiplied by batch, accumulation and number of GPUs: 1e-3 there
  is 8e-3 here.
- Images keep their aspect: the shorter side is scaled, the middle is kept. Theirs are squashed to a square.
- Images without a caption get one of 15 texts of ours in place of Textual Inversion's 27; there is no list of styles.
- Everything random has a seed, and nested dropout is drawn for each sample, not once for the batch.
- Layers are numbered by the names of the modules. A counter, as theirs, gives wrong gradients with checkpointing.
Ours besides: captions, masks, EMA and learning under AlignIT, all off unless asked for. `alignit: true` is for concepts
that are drawn with AlignIT: learnt plainly, a concept also speaks through the rows behind its own, end and padding too,
which AlignIT gives back to the base, and likeness goes with them. There is no prior preservation: it protects weights
that are trained, and here none of the base is; images of other things do not reach the mapper's gradient.

    accelerate launch training/neti.py --config configs/neti/emoji.yaml
    torchrun --nproc_per_node 2 training/neti.py --config configs/neti/emoji.yaml
    python training/neti.py --config configs/neti/emoji.yaml --dry-run --random_init --shrink 4
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit.alignit import alignit
from alignkit.artifacts import read_events, save_strip, write_card
from alignkit.attention import context_bank
from alignkit.base import Base
from alignkit.concepts import Concept, Concepts, create, encode_contexts, tokenize, towers
from alignkit.concepts.text import base_contexts, noun_ids, substitute
from alignkit.config import DiffusionConfig, command, free, to_dict
from alignkit.data import ConceptImage, load_image, read_concept_images
from alignkit.noise import draw_noise
from alignkit.run import Run

MOST_OF_VECTORS = 2e-3  # a learning rate: of diffusers' script for Textual Inversion, 5e-4 times 4
TEMPLATES = (
    "a photo of a {}", "a picture of a {}", "one {}", "a {}", "the {}", "a photo of the {}", "a snapshot of a {}",
    "a close-up of a {}", "a sharp photo of a {}", "a dim photo of the {}", "a bright picture of the {}",
    "a cropped photo of a {}", "an image of a {}", "a rendering of a {}", "a studio shot of the {}",
)  # fmt: skip


@dataclass
class MapperConfig:
    """NeTI's network (alignkit/concepts/mapper.py)."""

    hidden_size: int = 128
    """Width of the two hidden layers; the units that nested dropout orders."""
    num_frequencies: int = 1024
    """Of the Fourier features."""
    sigma_t: float = 0.03
    """Their standard deviation over timesteps: vectors vary over some 1 / sigma_t of them."""
    sigma_l: float = 2.0
    """Over layers: neighbouring layers are nearly independent."""
    bypass: bool = True
    """Add a learnt direction to the text encoder's output, in the values."""
    norm_mode: Literal["split", "joint"] = "split"
    """What gets the super-category's norm: the token vector, or token and bypass as one vector."""


@dataclass
class Config(DiffusionConfig):
    learning_rate: float = 8e-3
    """The paper's 1e-3 as its code applies it, to 8 images an update."""
    method: Literal["neti", "textual_inversion", "p_plus"] = "neti"
    """What is learnt: a mapper, one vector for all layers, or one for each layer."""
    mapper: MapperConfig = field(default_factory=MapperConfig)
    """Of method neti."""
    nested_dropout_prob: float = 0.5
    """Of method neti: how often the last hidden units of a sample and layer are dropped; 0 turns it off."""
    rescale: bool = True
    """Of method neti: give the token vector the norm of the super-category."""
    bypass_alpha: float = 0.2
    """Strength of the bypass, relative to the norm of what it is added to."""
    num_vectors: int = 1
    """Of the other methods: consecutive tokens that the placeholder stands for."""
    alignit: bool = False
    """Learn under AlignIT, which the concept is to be drawn with: all rows of the text but its own are the base's."""

    train_data_dir: str = ""
    """Folder of images; `<name>.txt` beside one is its caption, `masks/<name>.png` where its loss counts."""
    placeholder_token: str = "<thing>"
    """The new word."""
    super_category_token: str = "object"
    """A word that the base knows for this kind of thing."""
    templates: list[str] = field(default_factory=lambda: list(TEMPLATES))
    """Texts for images without a caption, {} in the placeholder's place."""
    resolution: int | None = None
    """Side of the images in pixels; null is the base's own."""
    random_flip: bool = True
    """Mirror every second image."""
    gradient_checkpointing: bool = free(False)
    """Compute the U-Net's blocks twice, for less memory."""

    validation_prompts: list[str] = free(("a photo of a {}", "a {} on the beach", "a painting of a {}", "two {}"))
    """Each is drawn with each seed, {} in the placeholder's place."""
    validation_seeds: list[int] = free((42, 420))
    """Of the validation's noise."""
    num_inference_steps: int = free(50)
    """Of the validation: DDIM steps."""
    guidance_scale: float = free(7.5)
    """Of the validation."""

    def __post_init__(self):
        super().__post_init__()
        self.validation_prompts, self.validation_seeds = list(self.validation_prompts), list(self.validation_seeds)
        if not self.train_data_dir:
            raise ValueError("train_data_dir: expected a folder of images, got none")
        if not 0 <= self.nested_dropout_prob <= 1:
            raise ValueError(f"nested_dropout_prob: expected 0 to 1, got {self.nested_dropout_prob}")
        if self.num_vectors < 1:
            raise ValueError(f"num_vectors: expected at least 1, got {self.num_vectors}")
        if self.alignit and self.num_vectors > 1:
            raise ValueError(f"num_vectors: expected 1 with alignit, which replaces one row, got {self.num_vectors}")
        for name in ("templates", "validation_prompts"):
            texts = getattr(self, name)
            wrong = [text for text in texts if text.count("{}") < 1]
            if not texts or wrong:
                raise ValueError(f"{name}: expected texts with {{}} in the placeholder's place, got {wrong or 'none'}")
        if self.method != "neti" and self.learning_rate > MOST_OF_VECTORS:
            warnings.warn(
                f"learning_rate {self.learning_rate:g} is a mapper's: {self.method} learns the vectors themselves, for "
                f"which {MOST_OF_VECTORS:g} is much",
                stacklevel=2,
            )
        if not self.validation_seeds:  # the card's pictures are drawn at the end also without a validation
            raise ValueError("validation_seeds: expected at least one, got none")


def train(cfg: Config) -> Path:
    """Runs or resumes the training. Returns its folder, with the concept and its card."""
    run = Run(cfg, "neti")
    base = run.load_base(hooked=True)
    concept = create(  # raises for a family whose layers have no text of their own
        cfg.method,
        base,
        cfg.placeholder_token,
        cfg.super_category_token,
        num_vectors=cfg.num_vectors,
        rescale=cfg.rescale,
        alpha=cfg.bypass_alpha,
        seed=cfg.seed,
        base_model=cfg.pretrained_model_name_or_path,
        **(asdict(cfg.mapper) if cfg.method == "neti" else {}),
    )
    concept.alignit = cfg.alignit
    concept.module.to(run.device)
    if cfg.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    data = Data(cfg, base, concept)
    if run.is_main:
        print(*data.odd, sep="\n", flush=True)
    run.prepare(dict(concept.module.named_parameters()))
    if run.position == 0:
        run.show(0, "data", data.pictures)

    for step in run.steps():
        losses = []
        for indices in run.micro_batches(step):
            batch = data.batch(run, step, indices)
            contexts = data.contexts(batch, nested_dropout=True)
            with context_bank(base.unet):
                loss = denoising_loss(base, batch, contexts, cfg.snr_gamma)
                run.backward(loss)
            losses.append(loss.detach())
        grad_norm = run.update()

        scalars = {"loss": torch.cat(losses), "grad_norm": grad_norm}
        if run.every(cfg.validation_steps, step):
            with run.averaged():
                scalars["validation_loss"] = validation_loss(run, base, data)
                if run.is_main:
                    run.show(step, "validation", draw(cfg, base, concept), captions(cfg))
                    if not cfg.dry_run:
                        concept.save(run.output_dir / "steps" / str(step + 1))
        run.log(step, **scalars)

    with run.averaged():
        if run.is_main:
            export(run, cfg, base, concept, data)
    run.finish()
    return run.output_dir


@dataclass
class Batch:
    """b samples: latents [b, C, h, w], noise of that shape, timesteps [b], where the loss counts [b, 1, h, w]."""

    prompts: list[str]
    x_0: Tensor
    noise: Tensor
    timestep: Tensor
    weight: Tensor
    truncation: Tensor | None  # [b, L]
    added: dict[str, Tensor]  # SDXL's text_embeds and time_ids


class Data:
    """The concept's images as latents, and the texts that go with them."""

    def __init__(self, cfg: Config, base: Base, concept: Concept):
        self.cfg, self.base, self.concept, self.towers = cfg, base, concept, towers(base)
        if cfg.alignit and any(len(noun_ids(tower, cfg.super_category_token)) > 1 for tower in self.towers):
            raise ValueError(
                f"super_category_token: expected a word of one token with alignit, got {cfg.super_category_token!r}"
            )
        resolution = base.image_size(cfg.resolution, cfg.resolution)[0]
        self.resolution, self.conditions = resolution, {}
        self.images, self.odd = read_concept_images(cfg.train_data_dir, resolution, cfg.placeholder_token)
        for text in [*cfg.templates, *cfg.validation_prompts, *(i.caption for i in self.images if i.caption)]:
            self.tokens(named(text, cfg))  # raises where one is too long
        self.pictures = torch.stack([load_image(image.path, resolution) for image in self.images])
        mirrored = torch.stack([self.pictures, self.pictures.flip(-1)], 1)  # [number of images, 2, 3, H, W]
        with torch.no_grad():
            self.latents = torch.stack([base.encode(pair.to(base.unet.device)).float() for pair in mirrored])
        self.weights = torch.stack([self.weight(image, resolution) for image in self.images]).to(self.latents.device)

    def weight(self, image: ConceptImage, resolution: int) -> Tensor:
        """[2, 1, h, w], as it is and mirrored, with mean 1: one everywhere, or the mask over its mean."""
        size = self.latents.shape[-2:]
        if image.mask is None:
            return torch.ones(2, 1, *size)
        mask = F.adaptive_avg_pool2d(load_image(image.mask, resolution).mean(0, keepdim=True), size)
        if mask.mean() < 1e-3:
            raise ValueError(f"{image.mask} is black: white is where the loss counts.")
        return torch.stack([mask, mask.flip(-1)]) / mask.mean()

    def tokens(self, prompt: str) -> list:
        return [tokenize(tower, prompt, {self.concept.placeholder_token: self.concept}) for tower in self.towers]

    def batch(self, run: Run, step: int, indices: Sequence[int], tag: str = "") -> Batch:
        """Samples of these global indices; all that is random in one comes from its own generator, in this order."""
        cfg, samples = self.cfg, []
        for index in indices:
            image = run.shuffled(len(self.images), index, "images")
            generator = run.generator(step, index, tag)
            flip = int(torch.rand((), generator=generator) < 0.5 * cfg.random_flip)
            template = cfg.templates[int(torch.randint(len(cfg.templates), (), generator=generator))]
            timestep = torch.randint(self.base.scheduler.config.num_train_timesteps, (), generator=generator)
            x_0 = self.latents[image, flip]
            noise = draw_noise(x_0.shape, generator, cfg.noise_offset).to(x_0)
            truncation = torch.zeros(0)
            if self.concept.kind == "neti":
                truncation = self.concept.module.draw_truncation(generator, cfg.nested_dropout_prob)
            prompt = named(self.images[image].caption or template, cfg)
            samples.append((prompt, x_0, noise, timestep, self.weights[image, flip], truncation))
        prompts, *tensors = zip(*samples, strict=True)
        x_0, noise, timestep, weight, truncation = (torch.stack(t).to(run.device) for t in tensors)
        truncation = truncation if truncation.numel() else None
        return Batch(list(prompts), x_0, noise, timestep, weight, truncation, self.added(prompts))

    def added(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """SDXL's pooled text, which reads the super-category in the placeholder's place, and sizes; else nothing."""
        if len(self.towers) == 1:
            return {}
        for prompt in set(prompts) - self.conditions.keys():
            plain = substitute(prompt, {self.concept.placeholder_token: self.concept.super_category_token})
            self.conditions[prompt] = self.base.condition([plain], self.resolution, self.resolution)
        names = ("text_embeds", "time_ids")
        return {name: torch.cat([self.conditions[prompt][name] for prompt in prompts]) for name in names}

    def contexts(self, batch: Batch, nested_dropout: bool) -> Tensor:
        """[b, L, S, 2 D], with gradient to what is learnt."""
        prompts = [self.tokens(prompt) for prompt in batch.prompts]
        keys, values = encode_contexts(
            self.towers,
            prompts,
            {self.concept.placeholder_token: self.concept},
            batch.timestep,
            len(self.concept.layers or [0]),
            batch.truncation if nested_dropout else None,
        )
        contexts = torch.cat([keys, values], dim=-1)
        return self.aligned(contexts, prompts) if self.cfg.alignit else contexts

    def aligned(self, contexts: Tensor, prompts: list) -> Tensor:
        """The concept's rows of contexts [b, L, S, 2 D], all others the base's, as AlignIT infuses them."""
        is_concept = torch.zeros(len(contexts), 1, contexts.shape[2], 1, dtype=torch.bool)
        for row, (tokens, *_) in zip(is_concept, prompts, strict=True):
            for _, start in tokens.spans:
                row[:, start] = True
        base = base_contexts(self.towers, prompts).to(contexts)
        return torch.where(is_concept.to(contexts.device), contexts, torch.cat([base, base], -1)[:, None])


def named(text: str, cfg: Config) -> str:
    return text.replace("{}", cfg.placeholder_token)


def predict(base: Base, x_t: Tensor, timestep: Tensor, contexts: Tensor, added: dict[str, Tensor]) -> Tensor:
    """The network's output [b, C, h, w], inside a context bank."""
    return base.forward(x_t, timestep, {"encoder_hidden_states": contexts, **added})


def denoising_loss(base: Base, batch: Batch, contexts: Tensor, snr_gamma: float | None = None) -> Tensor:
    """[b]: mean squared error of the network's prediction (DDPM, Ho et al. 2020, eq. 14), inside a context bank."""
    x_t = base.schedule.add_noise(batch.x_0, batch.noise, batch.timestep)
    output = predict(base, x_t, batch.timestep, contexts, batch.added)
    target = base.schedule.target(batch.x_0, batch.noise, batch.timestep)
    loss = (batch.weight * F.mse_loss(output, target, reduction="none")).mean((1, 2, 3))
    return loss * base.schedule.min_snr_weight(batch.timestep, snr_gamma).to(loss) if snr_gamma else loss


@torch.no_grad()
def validation_loss(run: Run, base: Base, data: Data, number: int = 32) -> float:
    """The loss without nested dropout on images, timesteps and noise that are always the same."""
    losses = []
    for start in range(0, number, run.cfg.train_batch_size):
        batch = data.batch(run, 0, range(start, min(number, start + run.cfg.train_batch_size)), tag="validation")
        with context_bank(base.unet):
            losses.append(denoising_loss(base, batch, data.contexts(batch, nested_dropout=False)))
    return float(torch.cat(losses).mean())


def captions(cfg: Config) -> list[str]:
    return [f"{named(prompt, cfg)} (seed {seed})" for prompt in cfg.validation_prompts for seed in cfg.validation_seeds]


def draw(cfg: Config, base: Base, concept: Concept, truncation: int | None = None, seeds: int | None = None) -> Tensor:
    """Every validation prompt with every seed (or the first so many), by the stock pipeline: [N, 3, H, W] in [0, 1]."""
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    side = cfg.resolution
    images = []
    concepts = Concepts([concept])
    use = alignit(pipe, concepts, truncation=truncation) if cfg.alignit else concepts.applied(pipe, truncation)
    with use:
        for prompt in cfg.validation_prompts:
            seeds_of_prompt = cfg.validation_seeds[:seeds]
            images.append(
                pipe(
                    named(prompt, cfg),
                    num_images_per_prompt=len(seeds_of_prompt),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds_of_prompt],
                    num_inference_steps=cfg.num_inference_steps,
                    guidance_scale=cfg.guidance_scale,
                    height=side,
                    width=side,
                    output_type="pt",
                ).images
            )
    return torch.cat(images).float().clamp(0, 1)


def truncations(hidden_size: int) -> list[int]:
    """1, 2, 4, ... and all of the hidden units."""
    return [2**i for i in range(hidden_size.bit_length()) if 2**i < hidden_size] + [hidden_size]


def export(run: Run, cfg: Config, base: Base, concept: Concept, data: Data) -> None:
    """The concept, its pictures, the strip of truncations, the curves, and a card."""
    folder = concept.save(run.output_dir)
    pictures = [folder / "validation.png"]
    save_strip(pictures[0], draw(cfg, base, concept).split(len(cfg.validation_seeds)))
    use = (
        "alignit(pipe, alignkit.concepts.load(folder))"
        if cfg.alignit
        else "alignkit.concepts.load(folder).applied(pipe)"
    )
    text = (
        f"Learnt from {len(data.images)} images of {cfg.train_data_dir} by `training/neti.py` (method {cfg.method})."
        f"\n\n```python\nwith {use}:\n"
        f'    pipe("a photo of a {cfg.placeholder_token}")\n```\n\n'
        f"The rows of the first picture: {', '.join(named(p, cfg) for p in cfg.validation_prompts)}."
    )
    if cfg.method == "neti":
        kept = truncations(cfg.mapper.hidden_size)
        strip = torch.stack([draw(cfg, base, concept, truncation, seeds=1) for truncation in kept], 1)
        pictures.append(folder / "truncation.png")
        save_strip(pictures[1], strip.unbind())
        text += f" The columns of the second keep {', '.join(map(str, kept))} hidden units."
    write_card(
        folder,
        title=f"{cfg.placeholder_token}, a concept of {cfg.pretrained_model_name_or_path}",
        description=text,
        base_model=cfg.pretrained_model_name_or_path,
        config=to_dict(cfg),
        events=read_events(folder / "events.jsonl"),
        pictures=pictures,
        tags=["textual-inversion", cfg.method],
        instance_prompt=cfg.placeholder_token,
    )
    print(f"finished\npictures: {', '.join(map(str, pictures))}\nconcept:  {folder}", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(Config, train, argv)


if __name__ == "__main__":
    main()
