import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.data import (
    Buckets,
    bucket_sizes,
    check_concept,
    check_concept_image,
    image_shape,
    load_image,
    open_image,
    read_concept_images,
    read_prompts,
)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_of_text_is_a_prompt(tmp_path):
    prompts = read_prompts(write(tmp_path, "p.txt", "\ufeffa cat\n\n  a dog \n"))
    assert prompts.prompts == ["a cat", "a dog"] and prompts.columns == {}


def test_other_keys_of_jsonl_are_columns(tmp_path):
    prompts = read_prompts(
        write(tmp_path, "p.jsonl", '{"prompt": "two cats", "count": 2}\n{"count": null, "prompt": "a"}')
    )
    assert (prompts.prompts, prompts.columns, len(prompts)) == (["two cats", "a"], {"count": [2, None]}, 2)
    rows = prompts.rows([1, 0, 1])
    assert (rows.prompts, rows.columns) == (["a", "two cats", "a"], {"count": [None, 2, None]})


def test_only_a_new_line_ends_a_line(tmp_path):
    """JSON may hold a line separator in a string, and pandas, datasets and jq write it so."""
    prompts = read_prompts(write(tmp_path, "p.jsonl", '{"prompt": "a\u2028cat\x85"}\r\n{"prompt": "a dog"}\r\n'))
    assert prompts.prompts == ["a\u2028cat\x85", "a dog"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n\n", "is empty"),
        ("p.csv", "a cat", "ends in .txt or .jsonl"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3: not JSON"),
        ("p.jsonl", '["a cat"]', "line 1: expected an object"),
        ("p.jsonl", '{"text": "a cat"}', "line 1: expected an object"),
        ("p.jsonl", '{"prompt": " "}', "line 1: expected an object"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "count": 1}', r"line 2: expected the keys of the first line"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_a_missing_file_says_from_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="seen from"):
        read_prompts(tmp_path / "missing.txt")


# Image folders


def picture(path, size=(64, 64), seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_images_with_captions_and_masks(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    (tmp_path / "1.txt").write_text("a <thing>\non a table\n")
    picture(tmp_path / "masks" / "2.png", mode="L")
    (tmp_path / "notes.md").write_text("not an image")
    images, odd = read_concept_images(tmp_path, 64, "<thing>")
    assert [i.path.name for i in images] == ["0.png", "1.png", "2.png"] and odd == []
    assert [i.caption for i in images] == [None, "a <thing> on a table", None]
    assert [i.mask for i in images] == [None, None, tmp_path / "masks" / "2.png"]
    assert check_concept(tmp_path, 64) == ["3 images, 1 with a caption, 1 with a mask."]


def test_what_is_odd_is_said_and_what_is_wrong_is_refused_all_at_once(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (odd,) = [check_concept(tmp_path, 100)]
    assert len(odd) == 5 and "duplicate" in odd[3] and "enlarged from 64 x 64" in odd[1] and "fewer than 3" in odd[4]
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    picture(tmp_path / "tiny.png", size=(8, 8))
    picture(tmp_path / "masks" / "a.png", size=(32, 32))
    (tmp_path / "b.txt").write_text("a toy")
    picture(tmp_path / "huge.png", size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # Pillow refuses what has more than twice as many
    with pytest.raises(ValueError, match="5 files that cannot be used") as error:
        read_concept_images(tmp_path, 64, "<thing>")
    for part in (
        "broken.jpg cannot be read",
        "huge.png cannot be read",
        "tiny.png has 8 x 8",
        "masks/a.png has another size",
        "'a toy'",
    ):
        assert part in str(error.value)


def test_a_caption_holds_the_placeholder_as_a_word(tmp_path):
    """One within another word would train nothing."""
    picture(tmp_path / "a.png")
    for caption, placeholder, found in [
        ("two <thing>s", "<thing>", True),
        ("a <thing>_1", "<thing>", False),
        ("my qxz.", "qxz", True),
        ("two qxzs", "qxz", False),
    ]:
        (tmp_path / "a.txt").write_text(caption)
        wrong = check_concept_image(tmp_path / "a.png", 64, placeholder)[2]
        assert (wrong == []) == found, caption


def test_a_caption_that_is_not_utf_8_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("un <thing> usé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 \(.* at byte 13\): save it as such"):
        read_concept_images(tmp_path, 64, "<thing>")


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="No image"):
        read_concept_images(tmp_path, 64)
    with pytest.raises(FileNotFoundError, match="seen from"):
        read_concept_images(tmp_path / "missing", 64)


def test_images_keep_their_aspect_turn_as_exif_says_and_stand_on_white(tmp_path):
    image = Image.new("RGB", (60, 30), "red")
    image.paste("blue", (0, 0, 15, 30))  # the left quarter, which a square crop loses
    image.save(tmp_path / "wide.png")
    square = load_image(tmp_path / "wide.png", 30)
    assert square.shape == (3, 30, 30) and (square[0, :, 2:] == 1).all() and (square[2, :, 2:] == 0).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (30, 60)
    assert image_shape(tmp_path / "turned.jpg") == (60, 30) and image_shape(tmp_path / "wide.png") == (30, 60)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert [open_image(tmp_path / "deep.png").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


# Images of several shapes


@pytest.mark.parametrize(("size", "multiple"), [((512, 512), 64), ((1024, 1024), 64), ((64, 64), 16), ((16, 16), 16)])
def test_bucket_sizes(size, multiple):
    """Whole multiples of nearly the square's area up to 2 : 1, the square among them, each also lying down."""
    sizes = bucket_sizes(size, multiple)
    assert size in sizes and sorted(size[::-1] for size in sizes) == sizes == sorted(set(sizes))
    for height, width in sizes:
        assert height % multiple == width % multiple == 0 and max(height, width) <= 2 * min(height, width)
        assert size[0] * size[1] - multiple * max(height, width) < height * width <= size[0] * size[1]


def test_bucket_sizes_by_hand():
    assert bucket_sizes((512, 512), 64) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    with pytest.raises(ValueError, match="multiples of 64 pixels, got .500, 500"):
        bucket_sizes((500, 500), 64)


def order(size, epoch, tag):
    return torch.randperm(size, generator=torch.Generator().manual_seed(len(tag) + 100 * epoch))


def test_every_group_has_one_size_and_every_image_comes_equally_often():
    """Also the only one of its shape; over each cycle of as many groups as there are images."""
    shapes = [(100, 100)] * 4 + [(100, 151)] * 7 + [(90, 30)]
    buckets = Buckets(shapes, bucket_sizes((64, 64), 16), batch_size=3)
    assert [buckets.size(row) for row in (0, 4, 11)] == [(64, 64), (48, 80), (80, 48)]
    rows = [buckets.row(index, order) for index in range(2 * 12 * 3)]
    groups = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    assert all(len({buckets.size(row) for row in group}) == 1 for group in groups)
    for cycle in (rows[:36], rows[36:]):
        assert sorted(cycle) == sorted([*range(12)] * 3)
    assert [len(set(group)) for group in groups if 11 in group] == [1, 1]
    wide = [row for row in rows if 4 <= row < 11]  # its images take turns, too
    assert all(sorted(wide[start : start + 7]) == [*range(4, 11)] for start in range(0, len(wide), 7))
    assert rows[:36] != rows[36:]
