"""Train the emoji world's contrastive models: the base's text tower, and the CLIP of each judging role.

    python training/emoji/clip.py --role base
    python training/emoji/clip.py --role training     # then monitor, evaluator: other seeds and widths

Two helps make a small model learn in minutes: every batch holds for each caption one that is almost right, and the
vision tower also names the sprite under each of its patches (from the exact labels; that head is not kept). The judges'
embedding also has to rank pairs of pictures by the aesthetic formula; the head that does is saved as a judge, too.
"""

from argparse import ArgumentParser
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    ConvNextConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from alignkit.emoji import WEIGHTS_DIR, aesthetics, captions, degrade, fit, scenes, sprites
from alignkit.emoji.judges import AestheticHead

TOKENIZER = WEIGHTS_DIR / "base" / "tokenizer"
ROLES = {  # width of text and vision, layers of each, seed; the evaluator looks through convolutions, not patches
    "base": dict(text=160, text_layers=3, vision=192, vision_layers=4, seed=21),
    "training": dict(text=96, text_layers=2, vision=112, vision_layers=4, seed=22),
    "monitor": dict(text=64, text_layers=2, vision=88, vision_layers=4, seed=23),
    "evaluator": dict(text=88, text_layers=2, vision=(56, 128), vision_layers=(2, 4), seed=24),
}
PATCH = 8  # pixels
STEPS = {"base": 1500, "training": 1250, "monitor": 700, "evaluator": 900}
BATCH_SIZE = 64
EMBEDDING_DIM = 128


def build(
    text: int, text_layers: int, vision: int | tuple, vision_layers: int | tuple
) -> CLIPModel | VisionTextDualEncoderModel:
    """A CLIP with a ViT, or with a ConvNeXt where `vision` holds the widths of its stages."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=text, intermediate_size=4 * text, num_hidden_layers=text_layers,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu",
        projection_dim=EMBEDDING_DIM, attn_implementation="eager",  # on a CPU faster than the fused one
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if isinstance(vision, tuple):
        convnext = ConvNextConfig(
            image_size=scenes.SIZE, patch_size=PATCH // 2, num_stages=len(vision), hidden_sizes=list(vision),
            depths=list(vision_layers), hidden_size=vision[-1],  # where the dual encoder looks for the output's width
        )  # fmt: skip
        both = VisionTextDualEncoderConfig.from_vision_text_configs(
            convnext, text_config, projection_dim=EMBEDDING_DIM, attn_implementation="eager"
        )
        return VisionTextDualEncoderModel(both)
    vision_config = CLIPVisionConfig(
        hidden_size=vision, intermediate_size=3 * vision, num_hidden_layers=vision_layers, num_attention_heads=4,
        image_size=scenes.SIZE, patch_size=PATCH, hidden_act="gelu", projection_dim=EMBEDDING_DIM,
    )  # fmt: skip
    config = CLIPConfig(
        text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), projection_dim=EMBEDDING_DIM
    )
    return CLIPModel._from_config(config, attn_implementation="eager")


def rank(scores: torch.Tensor, beauty: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Bradley-Terry loss over all pairs of a batch whose beauty is known and differs by more than 0.2, and r."""
    known = beauty.isfinite()
    scores, beauty = scores.float()[known], beauty[known]
    better = (beauty[:, None] - beauty[None]) > 0.2
    loss = F.softplus(scores[None] - scores[:, None])[better].mean()
    return loss, {"aesthetic_r": torch.corrcoef(torch.stack([scores.detach(), beauty]))[0, 1].item()}


@torch.no_grad()
def standardised(head: AestheticHead, clip: nn.Module, number: int = 512) -> AestheticHead:
    """A copy whose scores have mean 0 and standard deviation 1 over scenes: pairs teach an order, but no scale."""
    rng = np.random.default_rng(20)
    world = scenes.World(with_held_out=True)
    drawn = [replace(world.draw(rng), blur=aesthetics.sample_blur(rng)) for _ in range(number)]
    images = fit.to_float(np.stack([scenes.render(scene).image for scene in drawn]))
    embeds = clip.get_image_features(pixel_values=(images - 0.5) / 0.25).pooler_output
    scores = head(F.normalize(embeds, dim=-1))
    head = deepcopy(head)
    head.score.weight.div_(scores.std())
    head.score.bias.sub_(scores.mean()).div_(scores.std())
    return head


def main(role: str, steps: int) -> None:
    settings = dict(ROLES[role])
    seed = settings.pop("seed")
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    clip = build(**settings)
    name_patches = nn.Linear(clip.visual_projection.in_features, len(sprites.catalogue()) + 1)
    head = AestheticHead(EMBEDDING_DIM)
    judge = role != "base"
    # the base's tower sees nothing that is held out, not in a negative either; a judge must read it
    world = scenes.World(overlap=0.2, with_held_out=judge)
    degraded = degrade.Degrader(WEIGHTS_DIR / "base" / "vae") if judge else None

    def almost(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
        while True:
            changed = captions.mutated(scene, rng)
            if judge or not scenes.holds_unseen([o.sprite for o in changed.objects], changed.background):
                return changed

    def make_batch(rng: np.random.Generator) -> dict:
        drawn = [world.draw(rng) for _ in range(BATCH_SIZE)]
        rendered = [scenes.render(scene) for scene in drawn]
        beauty = [float("nan")] * BATCH_SIZE
        if judge:
            drawn = [replace(scene, blur=aesthetics.sample_blur(rng)) for scene in drawn]
            beauty = [
                aesthetics.aesthetic(s, r) if r.class_map.any() else float("nan")
                for s, r in zip(drawn, rendered, strict=True)
            ]
            rendered = [scenes.render(scene) for scene in drawn]
        texts = [captions.caption(s, rng) for s in drawn] + [captions.caption(almost(s, rng), rng) for s in drawn]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        images = fit.to_float(np.stack([r.image for r in rendered]))
        if degraded is not None:
            images = degraded(images, rng, blur=False)  # its blur is labelled, above
        return {
            "images": images,
            "beauty": torch.tensor(beauty),
            "labels": torch.from_numpy(np.stack([r.class_map for r in rendered])),
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
        }

    def loss_fn(batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        vision = clip.vision_model((batch["images"] - 0.5) / 0.25)
        text = clip.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        image_embeds = F.normalize(clip.visual_projection(vision.pooler_output).float(), dim=-1)
        text_embeds = F.normalize(clip.text_projection(text.pooler_output).float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=50) * image_embeds @ text_embeds.T  # [B, 2B]
        target = torch.arange(len(logits))
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(logits)].T, target)) / 2
        centres = batch["labels"][:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten()
        seen = vision.last_hidden_state  # [B, 1 + patches, D] of a ViT, [B, D, h, w] of a ConvNeXt
        seen = seen.flatten(2).mT if seen.ndim == 4 else seen[:, 1:]
        names = name_patches(seen).float().flatten(0, 1)
        weight = torch.where(centres > 0, 1.0, 0.1)
        named = (F.cross_entropy(names, centres, reduction="none") * weight).sum() / weight.sum()
        loss, logs = contrastive + 0.5 * named, {}
        if judge:
            ranked, logs = rank(head(image_embeds), batch["beauty"])
            loss = loss + ranked
        on_sprite = centres > 0
        return loss, logs | {
            "contrastive": contrastive.item(),
            "retrieval": (logits[:, : len(logits)].argmax(1) == target).float().mean().item(),
            "with_negatives": (logits.argmax(1) == target).float().mean().item(),
            "patches": (names.argmax(1) == centres)[on_sprite].float().mean().item(),
        }

    def save() -> None:
        if role == "base":
            text_model = CLIPTextModel(clip.config.text_config)
            text_model.load_state_dict(clip.text_model.state_dict())
            fit.halves(text_model).save_pretrained(WEIGHTS_DIR / "base" / "text_encoder")
        else:
            folder = WEIGHTS_DIR / role / "clip"
            fit.halves(clip).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            CLIPImageProcessor(
                size={"shortest_edge": scenes.SIZE}, crop_size=scenes.SIZE, image_mean=[0.5] * 3, image_std=[0.25] * 3
            ).save_pretrained(folder)
            fit.halves(standardised(head, clip)).save_pretrained(WEIGHTS_DIR / role / "aesthetic")

    parts = {"clip": clip, "name_patches": name_patches} | ({"head": head} if judge else {})
    fit.fit(
        f"clip_{role}",
        nn.ModuleDict(parts),
        loss_fn,
        make_batch,
        save,
        steps=steps,
        learning_rate=1e-3,
        seed=seed,
        weight_decay=0.05,
    )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=list(ROLES), required=True)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    main(args.role, args.steps or STEPS[args.role])
