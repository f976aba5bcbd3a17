"""`alignkit evaluate ...`: figures by the evaluator, never by what was optimised."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from alignkit.emoji import WEIGHTS_DIR

FIGURES = WEIGHTS_DIR / "figures.json"


def world(
    what: Literal["all", "judges", "base"] = "all", guidance_scale: float = 5.0, most: int = 1000, save: bool = False
) -> dict:
    """Measure how good the emoji world is, the figures of its card (some minutes).

    Args:
        what: The judges on real scenes, the base by the evaluator, or both.
        guidance_scale: Of the base's sampling, 25 DDIM steps.
        most: Prompts of each kind at most; all that are held out unless told.
        save: Write the figures beside the weights, where the card and the tests read them.
    """
    from alignkit.base import load_base
    from alignkit.emoji import card, measure
    from alignkit.emoji.evaluator import Evaluator

    if save and (what, guidance_scale, most) != ("all", 5.0, 1000):
        raise ValueError("save: the card holds all figures at guidance 5, so it takes no other setting.")
    evaluator, figures = Evaluator(), {}
    base = load_base("emoji")
    if what in ("all", "judges"):
        figures |= measure.measure_judges(evaluator) | measure.measure_vae(base, evaluator)
    if what in ("all", "base"):
        figures |= measure.measure_base(base, evaluator, guidance_scale=guidance_scale, most=most)
    figures = {name: round(value, 4) for name, value in figures.items()}
    for name, value in figures.items():
        print(f"{name:40} {value:.3f}" if isinstance(value, float) else f"{name:40} {value}")
    if save:
        figures |= {"world_hash": measure.world_hash(), "sample": sample(base, evaluator)}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        card.write(figures)
    return figures


SAMPLE = 48  # prompts of each kind that the test of the bundled weights draws again


def sample(base, evaluator) -> dict:
    """The base's figures on the first SAMPLE prompts of each kind, [0, 1]."""
    from alignkit.emoji import measure

    return {k: round(v, 4) for k, v in measure.measure_base(base, evaluator, most=SAMPLE).items()}


def reward(
    lora: Sequence[str] = (),
    prompts: Literal["singles", "pairs", "counts", "three"] = "singles",
    trained_prompts: bool = False,
    number: int = 300,
    real: bool = False,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    results: str | None = None,
) -> list[dict]:
    """Compare LoRAs with the base on the same prompts and the same noise, by the evaluator.

    Args:
        lora: Folder of a trained LoRA.
        prompts: Which prompts of the emoji world; "three" is "exactly three ...".
        trained_prompts: Take the combinations that the base has seen, not the held-out ones.
        number: How many images; prompts are repeated with other noise where there are fewer.
        real: Score real scenes of these prompts, too, after a round trip through the VAE: what prompts leave to gain.
        num_inference_steps: DDIM steps.
        guidance_scale: Of classifier-free guidance.
        seed: Of the noise: image i starts from seed + i.
        dtype: Precision of the model that draws; bfloat16 is twice as fast on CPUs that have it.
        results: JSONL file to append one line per LoRA to.
    """
    from alignkit.emoji import measure

    settings = {
        "prompts": prompts, "held_out": not trained_prompts, "number": number, "seed": seed,
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "dtype": dtype,
    }  # fmt: skip
    reference = _score_base(**settings)

    def scored():
        yield "base", reference
        if real:
            yield "real", _score_real(prompts, not trained_prompts, number, dtype)
        for name in lora:
            yield name, _draw_and_score(name, **settings)

    rows: list[dict] = []
    for name, scores in scored():
        row = {"model": name, **settings, "world_hash": measure.world_hash(), **summary(scores, reference)}
        rows.append(row)
        print(json.dumps(row, indent=1))
        if results and name in lora:
            compared = {"base": rows[0]} | ({"real": rows[1]} if real else {}) | {"lora": row}
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(compared) + "\n")
    return rows


@cache  # drawn once for all that is compared with it in a process
def _score_base(**settings) -> dict:
    return _draw_and_score(None, **settings)


def _draw_and_score(
    lora: str | None, prompts: str, held_out: bool, number: int, seed: int, num_inference_steps: int,
    guidance_scale: float, dtype: str,
) -> dict:  # fmt: skip
    """Scores of a LoRA's images or the base's, as of `score`."""
    import torch

    from alignkit.artifacts import load_lora
    from alignkit.base import load_base
    from alignkit.emoji import measure
    from alignkit.emoji.evaluator import Evaluator

    asked = prompt_set(prompts, unseen=held_out)
    asked = [asked[i % len(asked)] for i in range(number)]
    base = load_base("emoji", dtype=getattr(torch, dtype))
    if lora:
        load_lora(base.unet, lora)
    images = measure.draw(
        base, [p.prompt for p in asked], seed=seed, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )  # fmt: skip
    return score(Evaluator(), prompts, asked, images)


def _score_real(prompts: str, held_out: bool, number: int, dtype: str) -> dict:
    """The same scores of a real scene for each prompt, after a round trip through the VAE."""
    import numpy as np
    import torch

    from alignkit.base import load_base
    from alignkit.emoji import measure
    from alignkit.emoji.evaluator import Evaluator
    from alignkit.emoji.fit import to_float
    from alignkit.emoji.prompts import scene_of
    from alignkit.emoji.scenes import render

    asked = prompt_set(prompts, unseen=held_out)
    asked = [asked[i % len(asked)] for i in range(number)]
    rng = np.random.default_rng(EVALUATION_SEED)
    images = to_float(np.stack([render(scene_of(prompt, rng)).image for prompt in asked]))
    base = load_base("emoji", dtype=getattr(torch, dtype))
    with torch.no_grad():
        trip = measure.in_batches(lambda some: base.decode(base.encode(some)).float().clamp(0, 1), images)
    return score(Evaluator(), prompts, asked, trip)


EVALUATION_SEED = 2_000_000  # of the first evaluation scene; validations during training start at another
EVALUATORS = {"segmentation": "emoji/evaluator/segmenter", "depth": "emoji/evaluator/depth"}


def controllability(
    controlnet: Sequence[str] = (),
    condition: str = "segmentation",
    evaluator: str | None = None,
    base: str = "emoji",
    base_config: str | None = None,
    data_dir: str = "emoji",
    clip: str | None = None,
    condition_args: dict[str, Any] | None = None,
    condition_column: str | None = None,
    resolution: int | None = None,
    number: int = 256,
    num_inference_steps: int = 20,
    guidance_scale: float = 5.0,
    prompt: str | None = None,
    negative_prompt: str = "",
    controlnet_conditioning_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    results: str | None = None,
) -> list[dict]:
    """Compare ControlNets by what can be read off their images again, on the same controls, prompts and noise.

    The first row, "real", is of the data's own images after a round trip through the VAE: what no ControlNet passes.
    KID is to the images whose controls and prompts are shown, so its estimate falls below 0 where pictures resemble
    their own originals: it ranks rows of one number of images, and is not to be set beside another paper's.
    Soft edges, line art and canny are read by the same formula as in training, since nothing in it was learned.

    Args:
        controlnet: Folder or Hub name of a ControlNet.
        condition: segmentation, depth, softedge, lineart, canny, or package.module:Class.
        evaluator: The condition's model; the emoji world's evaluator unless told. Never the one of the training.
        base: Base model: "emoji", a folder in diffusers format, a name on the Hub, or a .safetensors file.
        base_config: Of a base model that is a .safetensors file: the folder or Hub name of its configs.
        data_dir: "emoji" for fresh scenes, or a folder with metadata.jsonl.
        clip: Of the text-image score and of the features of KID and diversity; the emoji world's evaluator unless told.
        condition_args: How the control is shown and compared, such as {"palette": "colours.json"} or {"sigma": 1.5};
            unless told, as in the config.yaml beside each ControlNet. One without it sees the condition's defaults.
        condition_column: Key of metadata.jsonl with the controls' files; the condition's own unless told.
        resolution: Side of the images in pixels; the base's own unless told.
        number: How many images.
        num_inference_steps: DDIM steps; Euler of SD3 and FLUX.
        guidance_scale: Of classifier-free guidance; FLUX reads it.
        prompt: Draws all images, in place of their own: "" shows what a ControlNet knows of its control by itself. The
            text-image score stays with their own.
        negative_prompt: What to steer away from.
        controlnet_conditioning_scale: Strength of the ControlNet's residuals.
        seed: Of the noise: image i starts from seed + i.
        batch_size: Images drawn, encoded and judged at once.
        device: "cpu", "cuda", ...; auto takes a GPU where there is one.
        dtype: Precision of the base that draws.
        results: JSONL file to append one line per row to.
    """
    import torch

    from alignkit.base import load_base, pick_device, require_finite
    from alignkit.conditions import build_condition
    from alignkit.conditions import score as score_condition
    from alignkit.controlnet import draw_controlled, load_controlnet
    from alignkit.controls import open_controls
    from alignkit.emoji import measure, resolve
    from alignkit.rewards.clip import ClipEncoder

    device = pick_device(device)
    if base == "emoji":
        evaluator, clip = evaluator or EVALUATORS.get(condition), clip or "emoji/evaluator/clip"
    if condition in EVALUATORS and not evaluator:
        raise ValueError(f"evaluator: expected a model for {condition}; only the emoji world has judges of its own.")
    if clip is None:
        raise ValueError("clip: expected a folder or Hub name of a CLIP; only the emoji world has a judge of its own.")
    condition_args = _condition_args(condition, controlnet, evaluator, condition_args)
    model = {"model": evaluator} if evaluator else {}
    judge = build_condition(condition, evaluator=True, **condition_args, **model).to(device)
    data = open_controls(data_dir, judge, condition_column)
    encoder = ClipEncoder(resolve(clip)).to(device)
    loaded = load_base(base, device=device, dtype=getattr(torch, dtype), config=base_config)
    size = loaded.image_size(resolution, resolution)
    number = number if data.size is None else min(number, data.size)
    prompts, real, targets = first_examples(data, judge, number, size, device)
    with torch.no_grad():
        features = measure.in_batches(encoder.embed_images, real)
    settings = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    shared = {
        "condition": condition, "condition_args": condition_args, "evaluator": evaluator or condition, "clip": clip,
        "base": base, "data": data_dir,
        "number": number, "seed": seed, "scheduler": "Euler" if loaded.schedule.is_flow else "DDIM",
        "height": size[0], "width": size[1], "controlnet_conditioning_scale": controlnet_conditioning_scale,
        "dtype": dtype, "prompt": prompt, **settings,
    }  # fmt: skip
    if base == "emoji":
        shared["world_hash"] = measure.world_hash()
    shown = prompts if prompt is None else [prompt] * number
    loaded.denoiser(shown[:1], negative_prompt, guidance_scale, *size)  # refuses settings that this base has not
    rows = []
    for name in ("real", *controlnet):
        if name == "real":
            with torch.no_grad():
                images = torch.cat([loaded.decode(loaded.encode(some)) for some in real.split(batch_size)])
            require_finite(images, loaded.vae.dtype)
        else:
            images = draw_controlled(
                loaded,
                load_controlnet(name, loaded.network, loaded.vae_scale_factor),
                judge.control(targets).float(),
                shown,
                range(seed, seed + number),
                conditioning_scale=controlnet_conditioning_scale,
                batch_size=batch_size,
                **settings,
            )
        scores = score_condition(judge, images, targets, batch_size)
        scores |= image_scores(encoder, images, prompts, features)
        rows.append({"model": name, **shared, **{key: round(value, 5) for key, value in scores.items()}})
        print(json.dumps(rows[-1], indent=1))
        if results:
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


def _condition_args(
    condition: str, controlnets: Sequence[str], evaluator: str | None, given: dict[str, Any] | None
) -> dict[str, Any]:
    """What is given, or how the ControlNets were shown the condition, as far as a config.yaml lies beside them.

    That is without `model` and `resolution`, which are of what read the training's images.

    Raises:
        ValueError: one was trained on another condition or by this very evaluator, or they were shown it differently.
    """
    import yaml

    from alignkit.conditions import CONDITIONS
    from alignkit.emoji import resolve, role

    if "model" in (given or {}):
        raise ValueError(f"condition_args: expected no model, which is named by `evaluator`, got {given['model']!r}")
    if evaluator and role(evaluator) in ("training", "monitor"):
        raise ValueError(f"evaluator: {evaluator} is a judge of the training; choose one that no training has seen.")
    seen: dict[str, dict[str, Any]] = {}
    for name in controlnets:
        path = Path(resolve(name)) / "config.yaml"
        trained = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("condition") if path.is_file() else None
        if not trained:
            continue
        if trained["name"] != condition and {trained["name"], condition} <= CONDITIONS.keys():
            raise ValueError(f"{name} was trained on {trained['name']}: it cannot be evaluated on {condition}.")
        if evaluator and resolve(evaluator) == resolve(trained["args"].get("model", "")):
            raise ValueError(f"evaluator: {evaluator} is what {name} was trained with; choose one that it was not.")
        seen[name] = {key: value for key, value in trained["args"].items() if key not in ("model", "resolution")}
    if given is not None or not seen:
        return given or {}
    first = next(iter(seen))
    for name, args in seen.items():
        if args != seen[first]:
            raise ValueError(
                f"{first} was trained on {condition} with {seen[first]}, {name} with {args}: evaluate them one by one, "
                "or say condition_args for all."
            )
    return seen[first]


def first_examples(data, judge, number: int, size: tuple[int, int], device: str) -> tuple:
    """Prompts, images [N, 3, H, W] and targets [N, H, W] of the first rows; the judge reads what the data has not."""
    import torch

    generators = [torch.Generator().manual_seed(EVALUATION_SEED + i) for i in range(number)]
    examples = [data.example(i, size, generator) for i, generator in enumerate(generators)]
    images = torch.stack([example.image for example in examples]).to(device)
    targets = [
        judge.extract(image[None])[0] if example.target is None else example.target.to(device)
        for example, image in zip(examples, images, strict=True)
    ]
    return [example.prompt for example in examples], images, torch.stack(targets)


def image_scores(encoder, images, prompts: list[str], real_features) -> dict[str, float]:
    """Mean cosine with the prompts; KID to the real images and mean distance of two images, on the same features."""
    import torch
    from torch.nn import functional as F
    from torchmetrics.image.kid import poly_mmd

    with torch.no_grad():
        features = torch.cat([encoder.embed_images(some) for some in images.split(32)])
        alignment = (features * encoder.embed_prompts(prompts)).sum(-1).mean()
    scores = {"alignment": float(alignment)}
    if len(features) > 1:
        # unit vectors, scaled to entries of order 1, which the kernel (x.y / d + 1)^3 is made for
        scale = features.shape[1] ** 0.5
        scores["KID"] = float(poly_mmd(scale * real_features, scale * features))
        scores["diversity"] = float(F.pdist(features).mean())
    return scores


def alignment(
    concept: str,
    prompts: str,
    images: str,
    model: str = "emoji",
    base_config: str | None = None,
    phrase: str | None = None,
    class_noun: str | None = None,
    clip: str | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    images_per_prompt: int = 2,
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    output_dir: str = "outputs/alignment",
) -> dict:
    """Compare a customised model with and without AlignIT, and with the base drawing the class noun.

    Text similarity is of the prompt without the concept (cosine, as Textual Inversion's protocol deletes the
    placeholder), image similarity the mean cosine with the concept's own pictures. Beside the scores it writes
    leak.png, attention.png and images.png.

    Args:
        concept: Folder of training/customize.py or training/neti.py, or a file of others (alignkit.customized.load).
        prompts: Prompt file with {} in the concept's place, such as "a {} and a rose".
        images: Folder of the concept's pictures.
        model: Base model: "emoji", a folder in diffusers format, a name on the Hub, or a .safetensors file.
        base_config: Of a base model that is a .safetensors file: the folder or Hub name of its configs.
        phrase: What prompts call the concept, where the file does not say it.
        class_noun: What it is, where the file does not say it.
        clip: The judge, a CLIP; the emoji world's evaluator unless told.
        num_inference_steps: DDIM steps.
        guidance_scale: Of classifier-free guidance.
        images_per_prompt: With consecutive seeds.
        seed: Of the first image of each prompt.
        device: "cpu", "cuda", ...; auto takes a GPU where there is one.
        dtype: Precision of the models that draw.
        output_dir: Where scores.json and the pictures go.
    """
    import torch
    from diffusers.utils import make_image_grid, numpy_to_pil

    from alignkit import alignment as parts
    from alignkit.artifacts import atomic, save_json
    from alignkit.base import load_base, pick_device
    from alignkit.customized import load
    from alignkit.data import load_image, read_concept_images, read_prompts

    asked = read_prompts(prompts).prompts
    wrong = [prompt for prompt in asked if prompt.count("{}") != 1]
    if wrong:
        raise ValueError(f"{prompts}: expected one {{}} for the concept in every prompt, got {wrong[0]!r}.")
    if clip is None and model != "emoji":
        raise ValueError("clip: expected a folder or Hub name of a CLIP; only the emoji world has a judge of its own.")
    options = {"device": pick_device(device), "dtype": getattr(torch, dtype), "config": base_config}
    base = load_base(model, **options).pipeline()
    customized = load(load_base(model, **options).pipeline(), concept, phrase, class_noun)
    settings = parts.Settings(num_inference_steps, guidance_scale, seed, images_per_prompt)
    embed_images, embed_texts = text_image_judge(clip, options["device"])
    side = base.unet.config.sample_size * base.vae_scale_factor
    shown = torch.stack([load_image(image.path, side) for image in read_concept_images(images, side)[0]])
    rest = [" ".join(prompt.replace("{}", "").split()) for prompt in asked for _ in range(images_per_prompt)]

    scores: dict = {}
    drawn, records, tokens = {}, {}, {}
    for arm in parts.ARMS:
        drawn[arm] = parts.draw(arm, base, customized, asked, settings)
        embeds = embed_images(drawn[arm])
        scores[arm] = {
            "text_similarity_of_the_rest": round(float((embeds * embed_texts(rest)).sum(-1).mean()), 4),
            "image_similarity": round(float((embeds @ embed_images(shown).T).mean()), 4),
        }
        records[arm] = parts.record(arm, base, customized, asked[0], settings)
        own = customized.concept
        text = asked[0].replace("{}", own.noun if arm == "base" else own.phrase)
        tokens[arm] = parts.prompt_tokens(customized.pipe, text, None if arm == "base" else own)
    rows = parts.other_rows(base, customized, asked[0])
    leaks = {arm: parts.leak(records["base"], records[arm], rows) for arm in parts.ARMS[1:]}
    for arm, found in leaks.items():
        scores[arm] |= {f"leak_{side}": sum(v.values()) / len(v) for side, v in found.items()}

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts.plot_leak(leaks, folder / "leak.png")
    firsts = {arm: pictures[0] for arm, pictures in drawn.items()}
    parts.plot_maps(records, firsts, tokens, folder / "attention.png")
    pictures = numpy_to_pil(torch.cat(list(drawn.values())).permute(0, 2, 3, 1).numpy())
    with atomic(folder / "images.png") as temporary:
        make_image_grid(pictures, rows=len(parts.ARMS), cols=len(rest)).save(temporary, "PNG")
    save_json({"concept": concept, "prompts": asked, **vars(settings), "scores": scores}, folder / "scores.json")
    print(json.dumps(scores, indent=1))
    print(f"pictures: {folder / 'images.png'}, {folder / 'leak.png'}, {folder / 'attention.png'}")
    return scores


def text_image_judge(clip: str | None, device: str = "cpu") -> tuple[Callable, Callable]:
    """Of images [N, 3, H, W] in [0, 1], and of N texts, embeddings [N, D] of unit length; all on the CPU but the work.

    `clip`: a folder or Hub name of a CLIP, or None for the emoji world's evaluator.
    """
    import torch

    from alignkit.emoji.measure import in_batches

    if clip is None:
        from alignkit.emoji.evaluator import Evaluator

        evaluator = Evaluator()
        return lambda images: in_batches(evaluator.embed_images, images), evaluator.embed_texts
    from alignkit.rewards.clip import ClipEncoder

    encoder = ClipEncoder(clip).to(device)
    embed = torch.no_grad()(lambda images: encoder.embed_images(images.to(device)).cpu())
    return lambda images: in_batches(embed, images), lambda texts: encoder.embed_prompts(texts).cpu()


def manipulation(
    prompt: str,
    source: Sequence[str] = (),
    model: str = "emoji",
    base_config: str | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    seed: int = 0,
    device: str = "auto",
    output: str = "outputs/manipulation.png",
) -> None:
    """Draw a grid: keys from one word (rows), values from another (columns); AlignIT's semantic manipulation.

    Args:
        prompt: With {} in the place of the word.
        source: A word; the words need equally many tokens.
        model: Base model: "emoji", a folder in diffusers format, a name on the Hub, or a .safetensors file.
        base_config: Of a base model that is a .safetensors file: the folder or Hub name of its configs.
        num_inference_steps: DDIM steps.
        guidance_scale: Of classifier-free guidance.
        seed: Of the noise, the same in all pictures.
        device: "cpu", "cuda", ...; auto takes a GPU where there is one.
        output: PNG to write.
    """
    from diffusers.utils import make_image_grid, numpy_to_pil

    from alignkit import alignment as parts
    from alignkit.artifacts import atomic
    from alignkit.base import load_base, pick_device

    if prompt.count("{}") != 1 or len(source) < 2:
        raise ValueError(
            f"Expected a prompt with one {{}} and at least two sources, got {prompt!r} and {list(source)}."
        )
    settings = parts.Settings(num_inference_steps, guidance_scale, seed)
    pipe = load_base(model, device=pick_device(device), config=base_config).pipeline()
    images = parts.manipulation(pipe, prompt, source, settings)
    pictures = numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
    with atomic(output) as temporary:
        make_image_grid(pictures, rows=len(source), cols=len(source)).save(temporary, "PNG")
    print(f"{output}: keys of {', '.join(source)} from top to bottom, values from left to right")


def prompt_set(name: str, unseen: bool) -> list:
    from alignkit.emoji import prompts

    if name == "three":
        return prompts.exactly(3, unseen=unseen)
    return {"singles": prompts.singles, "pairs": prompts.pairs, "counts": prompts.counts}[name](unseen=unseen)


def score(evaluator, kind: str, asked: list, images) -> dict:
    """Per-image answers, tensors [B]."""
    import torch

    from alignkit.emoji import sprites
    from alignkit.emoji.evaluator import matched_counts
    from alignkit.emoji.measure import in_batches

    counts = in_batches(evaluator.counts, images)
    index = torch.tensor([[sprites.by_name(n).index for n in p.objects] for p in asked])
    embeds = in_batches(evaluator.embed_images, images)
    answers = {
        "aesthetic": in_batches(evaluator.aesthetic, images),
        "present": (counts.gather(1, index) > 0.5).all(1).float(),
        "alignment": (embeds * evaluator.embed_texts([p.prompt for p in asked])).sum(-1),
        "background": torch.tensor(
            [float(b == p.background) for b, p in zip(evaluator.background(images), asked, strict=True)]
        ),
        # distance of each image's embedding from the mean of all, a monitor of collapse
        "spread": (embeds - embeds.mean(0)).norm(dim=-1),
    }
    if kind in ("counts", "three"):
        numbers = [p.count for p in asked]
        answers["exact"] = evaluator.exact(images, [p.objects[0] for p in asked], numbers).float()
        matched = [len(m) == n for m, n in zip(matched_counts(images), numbers, strict=True)]
        answers["pieces_matching"] = torch.tensor(matched).float()
    return answers


def summary(scores: dict, reference: dict) -> dict:
    """Means, and what the aesthetic score gained in standard deviations of the reference."""
    means = {name: round(float(values.mean()), 4) for name, values in scores.items()}
    gained = (scores["aesthetic"] - reference["aesthetic"]).mean() / reference["aesthetic"].std()
    kept = scores["present"].mean() / reference["present"].mean().clamp(min=1e-6)
    return means | {"aesthetic_gain_sd": round(float(gained), 3), "present_kept": round(float(kept), 4)}
