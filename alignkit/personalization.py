"""`alignkit evaluate personalization`: how well concepts are drawn, and how well prompts with them are followed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# Shapes of prompts in the emoji world, for a concept that stands alone, with another thing, or in another number.
EMOJI_PROMPTS = (
    "a {} on a red background", "a {} on a blue background", "a {} on a green background", "a {} on a white background",
    "a {} on a black background", "a {} on a purple background", "a {} and a rose on a yellow background",
    "a {} and a cat on a gray background", "a {} next to a tree", "a {} left of a house", "a {} right of a car",
    "two {} on a pink background", "a large {} on an orange background", "a small {} on a brown background",
    "a tilted {} on a blue background",
)  # fmt: skip
PROMPTS = (
    "a photo of a {}", "a {} on a beach", "a {} in the snow", "a {} in a jungle", "a {} on a wooden table",
    "a {} in front of a mountain", "a {} at night in a city", "a painting of a {}", "a pencil drawing of a {}",
    "a {} made of glass", "a {} beside a cup of coffee", "a {} under water", "two {} on a shelf",
    "a {} on a book cover", "a {} with flowers around it",
)  # fmt: skip


def evaluate(
    concept: Sequence[str],
    images: Sequence[str],
    model: str = "emoji",
    base_config: str | None = None,
    protocol: Literal["textual_inversion", "custom_concept101"] = "textual_inversion",
    evaluator: str | None = None,
    dino: str | None = None,
    prompts: str | None = None,
    seeds: int = 3,
    truncation: int | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    resolution: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    output_dir: str | None = None,
    results: str | None = None,
) -> list[dict]:
    """Score concepts: likeness to their training images, and to what else the prompts say.

    One that was learnt under AlignIT is drawn under it.

    Args:
        concept: Folder of a concept.
        images: Folder of real images of a concept, in the order of the concepts.
        model: Base model: "emoji", a folder in diffusers format, a name on the Hub, or a .safetensors file.
        base_config: Of a base model that is a .safetensors file: the folder or Hub name of its configs.
        protocol: Of Textual Inversion (cosines, the placeholder deleted from the text) or of CustomConcept101
            (CLIPScore, the class in its place). Their text scores do not compare, and are never shown in one table.
        evaluator: CLIP to score with: a folder or Hub name. On the emoji world, its own evaluator unless told, which
            adds "identity", the likeness by a judge of what the object is.
        dino: DINO for a second image score, such as facebook/dino-vits16, as CustomConcept101 reports it.
        prompts: File with a prompt a line, {} in the placeholder's place; 15 of ours unless told.
        seeds: Images of each prompt, from noise of seed 0, 1, ...
        truncation: Units of the mapper that are kept.
        num_inference_steps: DDIM steps.
        guidance_scale: Of classifier-free guidance.
        resolution: Side of the images in pixels; the base's own unless told.
        batch_size: Images drawn at once; each has the noise of its own seed.
        device: "cpu", "cuda", ...; auto takes a GPU where there is one.
        dtype: Precision of the model that draws.
        output_dir: Folder for a grid of pictures of each concept: a row a prompt, a column a seed.
        results: JSONL file to append one line per concept to.
    """
    import torch

    from alignkit.artifacts import save_strip
    from alignkit.base import load_base, pick_device
    from alignkit.concepts import check_truncation, load
    from alignkit.data import read_prompts
    from alignkit.metrics import table
    from alignkit.rewards import unique

    if len(concept) != len(images) or not concept:
        raise ValueError(f"Expected a folder of images for each concept, got {len(concept)} and {len(images)}.")
    if model != "emoji" and evaluator is None:
        raise ValueError("evaluator: expected a CLIP to score with, such as openai/clip-vit-base-patch32, got none.")
    texts = read_prompts(prompts).prompts if prompts else list(EMOJI_PROMPTS if model == "emoji" else PROMPTS)
    if any("{}" not in text for text in texts):
        raise ValueError(f"prompts: expected {{}} in the placeholder's place in every line of {prompts}.")
    loaded = [load(path) for path in concept]
    device = pick_device(device)
    base = load_base(model, device=device, dtype=getattr(torch, dtype), config=base_config)
    side = base.image_size(resolution, resolution)[0]
    real = [real_images(folder, side) for folder in images]
    for one in loaded:
        one.concepts[0].check(base)
        check_truncation(one.concepts, truncation)
    if results:
        Path(results).parent.mkdir(parents=True, exist_ok=True)
    scorer, rows = Scorer(evaluator, dino, device), []
    grids = unique([Path(name).resolve().name for name in concept])
    settings = {"seeds": seeds, "truncation": truncation, "num_inference_steps": num_inference_steps}
    settings |= {
        "guidance_scale": guidance_scale,
        "resolution": side,
        "dtype": dtype,
        "protocol": protocol,
        "evaluator": scorer.name,
    }
    for name, grid, one, shown in zip(concept, grids, loaded, real, strict=True):
        drawn = draw_concept(
            base, one, texts, seeds, truncation, num_inference_steps, guidance_scale, resolution, batch_size
        )
        scores = scorer(drawn, shown, [text for text in texts for _ in range(seeds)], one.concepts[0], protocol)
        figures = {figure: round(float(values.mean()), 4) for figure, values in scores.items()}
        rows.append({"concept": str(name), **settings, "num_images": len(drawn), **figures})
        if output_dir:
            save_strip(Path(output_dir) / f"{grid}.png", drawn.split(seeds))
        if results:
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(f"protocol {protocol}, scored by {scorer.name}\n\n{table(rows)}")
    return rows


def draw_concept(
    base,
    concepts,
    texts,
    seeds,
    truncation=None,
    num_inference_steps=25,
    guidance_scale=5.0,
    resolution=None,
    batch_size=8,
):
    """[len(texts) * seeds, 3, H, W] in [0, 1]: each prompt with noise of seed 0, 1, ..., by the stock pipeline."""
    import torch

    from alignkit.alignit import alignit
    from alignkit.base import require_finite

    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    concept, drawn = concepts.concepts[0], []
    wanted = [(text.replace("{}", concept.placeholder_token), seed) for text in texts for seed in range(seeds)]
    applied = alignit(pipe, concepts, truncation=truncation) if concept.alignit else concepts.applied(pipe, truncation)
    with applied:
        for start in range(0, len(wanted), batch_size):
            prompts, noise = zip(*wanted[start : start + batch_size], strict=True)
            drawn.append(
                pipe(
                    list(prompts),
                    generator=[torch.Generator().manual_seed(seed) for seed in noise],
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    height=resolution,
                    width=resolution,
                    output_type="pt",
                ).images.cpu()
            )
    return require_finite(torch.cat(drawn), base.network.dtype).float().clamp(0, 1)


def real_images(folder: str, resolution: int):
    import torch

    from alignkit.data import load_image, read_concept_images

    return torch.stack([load_image(image.path, resolution) for image in read_concept_images(folder, resolution)[0]])


class Scorer:
    """Image and text similarity of a concept's images by one CLIP: the emoji world's evaluator, or any."""

    def __init__(self, path: str | None, dino: str | None = None, device: str = "cpu"):
        from alignkit.evaluate import text_image_judge

        self.name, self.dino, self.identity = path or "emoji", None, None
        self.embed_images, self.embed_texts = text_image_judge(path, device)
        if path is None:
            from alignkit.emoji.evaluator import Evaluator

            self.identity = Evaluator().embed_identity
        if dino:
            self.dino = _dino(dino, device)

    def __call__(self, drawn, real, texts, concept, protocol) -> dict:
        """[N] tensors."""
        from alignkit.metrics import image_similarity, scored_text, text_similarity

        word, noun = concept.placeholder_token, concept.super_category_token
        told = [scored_text(text.replace("{}", word), word, noun, protocol) for text in texts]
        embeds = self.embed_images(drawn)
        scores = {
            "image_similarity": image_similarity(embeds, self.embed_images(real)),
            "text_similarity": text_similarity(embeds, self.embed_texts(told), protocol),
        }
        for name, embed in (("identity", self.identity), ("dino", self.dino)):
            if embed:
                scores[name] = image_similarity(embed(drawn), embed(real))
        return scores


def _dino(path: str, device: str):
    """Images [N, 3, H, W] in [0, 1] -> the class token, unit length (Caron et al. 2021), on the CPU."""
    import torch
    from transformers import AutoModel

    from alignkit.artifacts import read_pretrained
    from alignkit.emoji.measure import in_batches
    from alignkit.rewards.clip import IMAGENET_STATISTICS, fit, image_statistics

    model = read_pretrained(AutoModel, path, unused=[r"^pooler\."]).eval().to(device)  # DINO's own have no pooler
    mean, std = image_statistics(path, *IMAGENET_STATISTICS)

    @torch.no_grad()
    def embed(images):
        pixels = (fit(images, model.config.image_size) - mean) / std
        return torch.nn.functional.normalize(model(pixels.to(device)).last_hidden_state[:, 0], dim=-1).cpu()

    return lambda images: in_batches(embed, images)
