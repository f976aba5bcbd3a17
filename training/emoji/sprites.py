"""Render the emoji world's sprites from the Noto Color Emoji font (SIL OFL 1.1).

    python training/emoji/sprites.py --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

Needs Debian's `fonts-noto-color-emoji`. The PNGs are committed, so only a change of the catalogue calls for this.
"""

from argparse import ArgumentParser

from PIL import Image, ImageDraw, ImageFont

from alignkit.emoji import SPRITE_DIR, sprites

BITMAP_SIZE = 109  # the only strike that the font holds, in pixels
SPRITE_SIZE = 72


def render(font: ImageFont.FreeTypeFont, codepoint: str) -> Image.Image:
    """One emoji as a square RGBA picture of SPRITE_SIZE, cropped to its opaque pixels and centred."""
    canvas = Image.new("RGBA", (2 * BITMAP_SIZE, 2 * BITMAP_SIZE))
    ImageDraw.Draw(canvas).text((20, 20), chr(int(codepoint, 16)), font=font, embedded_color=True)
    glyph = canvas.crop(canvas.getbbox())
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, side - glyph.height))  # on the ground, not floating
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    font = ImageFont.truetype(parser.parse_args().font, BITMAP_SIZE)
    SPRITE_DIR.mkdir(parents=True, exist_ok=True)
    for sprite in sprites.catalogue():
        render(font, sprite.codepoint).save(SPRITE_DIR / f"{sprite.name.replace(' ', '_')}.png", optimize=True)
