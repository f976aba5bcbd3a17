"""The emoji world's evaluator: never a reward, never a monitor. `alignkit evaluate` alone opens it."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from alignkit.emoji import judges, matching, resolve, scenes, sprites
from alignkit.emoji.reader import Reader, Reading

PRESENT = 0.5  # expected number of a sprite from which it counts as present


class Evaluator:
    """Answers about images [B, 3, 64, 64] in [0, 1]; every answer is a tensor with one entry an image."""

    @cached_property
    def reader(self) -> Reader:
        return Reader.from_pretrained(resolve("emoji/evaluator/reader")).float().eval()

    @cached_property
    def identity(self) -> Reader:
        return Reader.from_pretrained(resolve("emoji/identity/reader")).float().eval()

    @cached_property
    def clip(self):
        return judges.load_clip("evaluator")

    @cached_property
    def head(self) -> judges.AestheticHead:
        return judges.AestheticHead.from_pretrained(resolve("emoji/evaluator/aesthetic")).float().eval()

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        return self.reader(images)

    def counts(self, images: Tensor) -> Tensor:
        """Expected number of each sprite, [B, sprites]."""
        return self.read(images).counts

    def present(self, images: Tensor, names: list[str]) -> Tensor:
        """Whether the named sprite is there, bool [B]."""
        index = torch.tensor([sprites.by_name(name).index for name in names])
        return self.counts(images).gather(1, index[:, None])[:, 0] > PRESENT

    def count(self, images: Tensor) -> Tensor:
        """Number of sprites of any kind, rounded, [B]."""
        return self.read(images).density.sum((1, 2, 3)).round()

    def exact(self, images: Tensor, names: list[str], numbers: list[int]) -> Tensor:
        """Whether the sprite is there that many times and nothing else is, bool [B]."""
        index = torch.tensor([sprites.by_name(name).index for name in names])
        reading = self.read(images)
        of_name = reading.counts.gather(1, index[:, None])[:, 0].round()
        target = torch.tensor(numbers)
        return (of_name == target) & (reading.density.sum((1, 2, 3)).round() == target)

    def background(self, images: Tensor) -> list[str]:
        names = list(scenes.BACKGROUNDS)
        return [names[i] for i in self.read(images).background_logits.argmax(1)]

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit length, [B, D]."""
        return self.clip.embed_images(images)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Unit length, [B, D]."""
        return self.clip.embed_texts(prompts)

    def alignment(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine of image and prompt, [B]."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)

    def aesthetic(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head(self.embed_images(images))

    @torch.no_grad()
    def embed_identity(self, images: Tensor) -> Tensor:
        """What the picture's object is, tint included, unit length, [B, D]."""
        return self.identity(images).embedding


def matched_counts(images: Tensor) -> list[list[str]]:
    """The names of the pieces that the evaluator without learning finds, an image each."""
    pictures = images.permute(0, 2, 3, 1).numpy().astype(np.float32)
    return [[piece.name for piece in matching.pieces(picture)] for picture in pictures]
