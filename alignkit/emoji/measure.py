"""The figures of the emoji world's card, measured by the evaluator. `alignkit evaluate world` runs it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from alignkit.base import require_finite
from alignkit.emoji import WEIGHTS_DIR, aesthetics, captions, prompts, resolve, scenes, sprites
from alignkit.emoji.evaluator import Evaluator, matched_counts
from alignkit.emoji.fit import to_float
from alignkit.emoji.judges import AestheticHead, DensityCounter, load_clip
from alignkit.emoji.prompts import Prompt

BATCH_SIZE = 32


def draw(
    base, texts: Sequence[str], *, seed: int = 0, num_inference_steps: int = 25, guidance_scale: float = 5.0
) -> Tensor:
    """An image per prompt from the stock pipeline, [B, 3, H, W] in [0, 1]. Image i starts from noise of seed + i."""
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    shape = base.latent_shape()
    images = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = list(texts[start : start + BATCH_SIZE])
        latents = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + start + i)) for i in range(len(batch))
        ]
        output = pipe(
            batch,
            latents=torch.stack(latents).to(base.unet.dtype),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        )
        images.append(require_finite(output.images, base.unet.dtype).float().clamp(0, 1))
    return torch.cat(images)


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in images.split(64)])


def share(answers: Sequence[bool] | Tensor) -> float:
    return float(torch.as_tensor(answers).float().mean())


def score_prompts(evaluator: Evaluator, kind: str, asked: list[Prompt], images: Tensor) -> dict[str, float]:
    """What the evaluators say of images drawn for singles, pairs or counts, as shares of the images."""
    counts = in_batches(evaluator.counts, images)
    index = torch.tensor([[sprites.by_name(n).index for n in p.objects] for p in asked])
    there = counts.gather(1, index) > 0.5
    right_background = [b == p.background for b, p in zip(evaluator.background(images), asked, strict=True)]
    matched = matched_counts(images)
    if kind == "counts":
        numbers = [p.count for p in asked]
        return {
            "exact count": share(evaluator.exact(images, [p.objects[0] for p in asked], numbers)),
            "number of pieces, by matching": share([len(m) == n for m, n in zip(matched, numbers, strict=True)]),
            "count background": share(right_background),
        }
    every = [set(p.objects) <= set(m) for p, m in zip(asked, matched, strict=True)]
    name = {"singles": "named object", "pairs": "both of a pair"}[kind]
    return {
        name: share(there.all(1)),
        f"{name}, by matching": share(every),
        f"{kind} background": share(right_background),
    }


def measure_base(
    base, evaluator: Evaluator, *, seed: int = 0, guidance_scale: float = 5.0, most: int = 1000
) -> dict[str, float]:
    """Prompts that the base was not trained on, 25 DDIM steps; at most `most` of each kind."""
    figures = {}
    for kind, asked in [("singles", prompts.singles()), ("pairs", prompts.pairs()), ("counts", prompts.counts())]:
        asked = asked[:most]
        images = draw(base, [p.prompt for p in asked], seed=seed, guidance_scale=guidance_scale)
        figures |= {f"{kind}: prompts": len(asked)} | score_prompts(evaluator, kind, asked, images)
    return figures


def real_scenes(
    number: int, world: scenes.World, seed: int
) -> tuple[list[scenes.Scene], list[scenes.Rendered], Tensor]:
    """Scenes, their renderings and their images; of a seed that no training uses."""
    rng = np.random.default_rng((97, seed))
    drawn = [world.draw(rng) for _ in range(number)]
    rendered = [scenes.render(scene) for scene in drawn]
    return drawn, rendered, to_float(np.stack([r.image for r in rendered]))


@torch.no_grad()
def measure_vae(base, evaluator: Evaluator, number: int = 256) -> dict[str, float]:
    drawn, rendered, images = real_scenes(number, scenes.World(kinds={"single": 1.0}), seed=1)
    trip = in_batches(lambda x: base.decode(base.encode(x)), images)
    on_sprite = torch.from_numpy(np.stack([r.class_map > 0 for r in rendered]))[:, None].float()
    mse = ((trip - images) ** 2 * on_sprite).sum() / (3 * on_sprite.sum())
    names = [s.objects[0].sprite.name for s in drawn]
    before, after = share(evaluator.present(images, names)), share(evaluator.present(trip, names))
    return {"VAE PSNR on sprites (dB)": float(-10 * mse.log10()), "VAE object accuracy kept": after / before}


@torch.no_grad()
def measure_judges(evaluator: Evaluator, number: int = 512) -> dict[str, float]:
    """On scenes with what was held out from the base, which no judge was trained on (another seed)."""
    world = scenes.World(with_held_out=True)
    drawn, rendered, images = real_scenes(number, world, seed=2)
    rng = np.random.default_rng(98)
    texts = [captions.caption(scene, rng) for scene in drawn]
    figures = {}
    for role in ("training", "monitor", "evaluator"):
        figures[f"{role}: retrieval among 64"] = retrieval(role, images, texts)
        figures[f"{role}: aesthetic r"], brightness, saturation = aesthetic_correlations(role, number)
        figures[f"{role}: aesthetic r with brightness"], figures[f"{role}: aesthetic r with saturation"] = (
            brightness,
            saturation,
        )
    class_map = torch.from_numpy(np.stack([r.class_map for r in rendered]))
    figures |= measure_control_judges(images, class_map, torch.from_numpy(np.stack([r.depth for r in rendered])))
    true = torch.tensor([len(np.unique(r.instance_map[r.instance_map > 0])) for r in rendered])
    for role in ("training", "monitor"):
        figures[f"{role}: exact count"] = share(count_density(role, images).round() == true)
    figures["evaluator: exact count"] = share(in_batches(evaluator.count, images) == true)
    figures["matching: exact count"] = share(torch.tensor([len(m) for m in matched_counts(images)]) == true)
    figures["evaluator: background"] = share(
        [b == s.background for b, s in zip(evaluator.background(images), drawn, strict=True)]
    )
    figures["identity among 64"] = identity_among(evaluator, 64)
    return figures


def measure_control_judges(images: Tensor, class_map: Tensor, depth: Tensor) -> dict[str, float]:
    """Both segmenters and both estimators of depth, by the figures of `alignkit evaluate controllability`.

    Its mIoU counts a class that is seen anywhere and is nowhere as 0: over 259 classes a strict one.
    """
    from alignkit.conditions import build_condition, score

    figures = {}
    for role, name, folder, targets in (
        ("training", "segmentation", "segmenter", class_map),
        ("evaluator", "segmentation", "segmenter", class_map),
        ("training", "depth", "depth", depth),
        ("evaluator", "depth", "depth", depth),
    ):
        if (WEIGHTS_DIR / role / folder).is_dir():
            judge = build_condition(name, evaluator=True, model=f"emoji/{role}/{folder}")
            figures |= {f"{role}: {name} {metric}": value for metric, value in score(judge, images, targets).items()}
    return figures


def retrieval(role: str, images: Tensor, texts: list[str]) -> float:
    """Share of images whose own caption is nearest among 64; captions with the same words count as the same."""
    clip = load_clip(role)
    text_embeds, image_embeds = clip.embed_texts(texts), in_batches(clip.embed_images, images)
    right = []
    for start in range(0, len(texts) - 63, 64):
        nearest = (image_embeds[start : start + 64] @ text_embeds[start : start + 64].T).argmax(1)
        right += [texts[start + i] == texts[start + int(n)] for i, n in enumerate(nearest)]
    return share(right)


def aesthetic_correlations(role: str, number: int) -> tuple[float, float, float]:
    """r of the head with the formula, and with mean brightness and saturation, on scenes with and without blur."""
    from dataclasses import replace

    rng = np.random.default_rng(99)
    world = scenes.World(kinds={"single": 0.5, "count": 0.2, "pair": 0.3}, with_held_out=True)
    truth, images = [], []
    while len(images) < number:
        scene = replace(world.draw(rng), blur=aesthetics.sample_blur(rng))
        sharp = scenes.render(replace(scene, blur=0.0))
        if sharp.class_map.any():
            truth.append(aesthetics.aesthetic(scene, sharp))
            images.append(scenes.render(scene).image)
    images = to_float(np.stack(images))
    head = AestheticHead.from_pretrained(resolve(f"emoji/{role}/aesthetic")).float().eval()
    scores = head(in_batches(load_clip(role).embed_images, images)).detach().numpy()
    brightness = images.mean((1, 2, 3)).numpy()
    saturation = ((images.amax(1) - images.amin(1)) / images.amax(1).clamp(min=1e-3)).mean((1, 2)).numpy()
    return tuple(float(np.corrcoef(scores, other)[0, 1]) for other in (truth, brightness, saturation))


def count_density(role: str, images: Tensor) -> Tensor:
    counter = DensityCounter.from_pretrained(resolve(f"emoji/{role}/counter")).float().eval()
    return in_batches(lambda x: counter(x).sum((1, 2, 3)), images)


def identity_among(evaluator: Evaluator, number: int, seed: int = 3) -> float:
    """Share of pictures whose nearest among one other picture of each of `number` sprites shows the same sprite."""
    rng = np.random.default_rng((97, seed))
    tiers = sprites.of_tier("named", "tier_b")
    chosen = [tiers[i] for i in rng.permutation(len(tiers))[:number]]

    def picture(sprite: sprites.Sprite) -> np.ndarray:
        background = scenes.sample_background(rng)
        placed = scenes.place(rng, [sprite], background["horizon"], False, None)
        return scenes.render(scenes.Scene(**background, objects=placed)).image

    def embedded() -> Tensor:
        return in_batches(evaluator.embed_identity, to_float(np.stack([picture(s) for s in chosen])))

    gallery = embedded()
    return share(torch.cat([(embedded() @ gallery.T).argmax(1) == torch.arange(number) for _ in range(4)]))


def world_hash() -> str:
    """Of every weight and config file of the world, 12 hexadecimal digits: what a result was measured on."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(p for p in WEIGHTS_DIR.glob("*/**/*") if p.suffix in (".safetensors", ".json")):
        digest.update(str(path.relative_to(WEIGHTS_DIR)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
