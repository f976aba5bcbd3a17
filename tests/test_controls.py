"""Folders of images with controls, scenes of the emoji world, and the check."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit import cli
from alignkit.conditions import build_condition
from alignkit.controls import check_folder, fit_to, open_controls
from tests.toy_conditions import save_segmenter


def write_folder(folder, number: int = 4, size=(20, 30), control: str | None = "red"):
    """Images whose red channel is a ramp of their number; every control is that channel."""
    rows = []
    for i in range(number):
        array = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True, parents=True)
        Image.fromarray(array).save(folder / f"images/{i}.png")
        row = {"image": f"images/{i}.png", "text": f"picture {i}"}
        if control:
            Image.fromarray(array[..., 0]).save(folder / f"images/{i}_{control}.png")
            row[control] = f"images/{i}_{control}.png"
        rows.append(row)
    write_metadata(folder, rows)
    return rows


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def red():
    return build_condition("tests.toy_conditions:Red")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_image_and_control_keep_the_same_geometry(tmp_path, red, crop):
    write_folder(tmp_path)
    controls = open_controls(str(tmp_path), red, crop=crop)
    cuts = set()
    for seed in range(6):
        example = controls.example(1, (16, 16), seeded(seed))
        assert example.image.shape == (3, 16, 16) and example.target.shape == (16, 16)
        torch.testing.assert_close(example.image[0], example.target, rtol=0, atol=1e-6)
        cuts.add(example.target[0].sum().item())
    assert (len(cuts) > 1) == (crop == "random")


def test_a_random_crop_is_a_samples_own(tmp_path, red):
    write_folder(tmp_path)
    controls = open_controls(str(tmp_path), red, crop="random")
    one, two = (controls.example(0, (16, 16), seeded(5)) for _ in range(2))
    assert torch.equal(one.image, two.image)


@pytest.mark.parametrize(("there", "wanted"), [((20, 30), (16, 16)), ((30, 20), (16, 8)), ((7, 5), (16, 16))])
def test_fit_to_brings_in_no_class(there, wanted):
    """Classes that are no neighbours in number: any interpolation would make others."""
    labels = torch.tensor([0, 7, 100, 255])[torch.randint(4, (1, *there), generator=seeded())]
    fitted = fit_to(labels, wanted, (0.5, 0.5))
    assert fitted.shape == (1, *wanted) and fitted.dtype == labels.dtype
    assert set(fitted.unique().tolist()) <= set(labels.unique().tolist())
    exact = fit_to(labels, there, (0.5, 0.5))
    assert torch.equal(exact, labels)


def test_where_a_control_is_missing_it_is_extracted(tmp_path, red):
    rows = write_folder(tmp_path)
    del rows[2]["red"]
    write_metadata(tmp_path, rows)
    controls = open_controls(str(tmp_path), red)
    assert controls.example(2, (16, 16), seeded()).target is None
    assert controls.example(1, (16, 16), seeded()).target is not None


def test_one_of_several_texts_is_drawn(tmp_path, red):
    rows = write_folder(tmp_path)
    rows[0] = {"file_name": rows[0]["image"], "text": ["one", "two"]}
    write_metadata(tmp_path, rows)
    controls = open_controls(str(tmp_path), red)
    drawn = {controls.prompt(0, seeded(i)) for i in range(20)}
    assert drawn == {"one", "two"} <= set(controls.prompts())
    assert all(controls.example(0, (16, 16), seeded(i)).prompt == controls.prompt(0, seeded(i)) for i in range(5))


def test_an_image_is_turned_as_its_exif_says(tmp_path, red):
    rows = write_folder(tmp_path, 1, control=None)
    picture = Image.open(tmp_path / rows[0]["image"])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "images/0.png", exif=exif)
    image = open_controls(str(tmp_path), red).example(0, (30, 20), seeded()).image
    expected = np.array(picture.rotate(-90, expand=True))
    assert np.array_equal((255 * image.permute(1, 2, 0)).round().byte().numpy(), expected)


# What is refused


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "images/2.png").unlink(), r"images/2.png: there is no such file \(.*metadata.jsonl, line 3\)"),
        (lambda f: truncated(f / "images/2.png"), "images/2.png: not a readable image"),
        (lambda f: (f / "images/2_red.png").unlink(), "images/2_red.png: there is no such file"),
        (lambda f: Image.new("L", (9, 8)).save(f / "images/2_red.png"), "2_red.png.*image's size 30 x 20, got 9 x 8"),
        (lambda f: shutil.copy(f / "images/2.png", f / "images/2_red.png"), "2_red.png.*got a colour picture"),
    ],
)
def test_a_bad_file_is_named(tmp_path, red, spoil, message):
    write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_controls(str(tmp_path), red)
    assert "1 of the files" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"text": "a"}', "line 1: expected"),
        ('{"image": "a.png"}', "line 1: expected"),
        ('{"image": "a.png", "text": []}', "line 1: expected"),
        ('{"image": "a.png", "text": "a", "red": 3}', "expected a path under 'red', got 3"),
        ("", "is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, red, line, message):
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        open_controls(str(tmp_path), red)


def test_a_folder_without_metadata(tmp_path, red):
    with pytest.raises(FileNotFoundError, match="There is no .*metadata.jsonl"):
        open_controls(str(tmp_path / "nowhere"), red)


def test_labels_with_unknown_classes_are_named(tmp_path):
    write_folder(tmp_path / "data", control="label")
    segmentation = build_condition("segmentation", model=save_segmenter(tmp_path / "segmenter"))
    with pytest.raises(ValueError, match=r"0_label.png: expected classes 0 to 4"):
        open_controls(str(tmp_path / "data"), segmentation)


# The check


def test_the_check_speaks_of_every_file(tmp_path, red, capsys):
    write_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    truncated(tmp_path / "images/3.png")
    rows, findings = check_folder(tmp_path, red)
    assert len(rows) == 3
    states = {finding.path.rpartition("/")[2]: finding.state for finding in findings}
    assert states == {"0.png": "used", "1.png": "used", "2.png": "used", "3.png": "error", "notes.txt": "unused"}
    with pytest.raises(SystemExit, match="1 of 4"):
        cli.main(["data", "check", str(tmp_path), "--condition", "tests.toy_conditions:Red"])
    said = capsys.readouterr().out
    assert "unused" in said and "notes.txt" in said and "not a readable image" in said
    write_folder(tmp_path)
    cli.main(["data", "check", str(tmp_path)])
    assert "4 images can be used" in capsys.readouterr().out


def test_files_under_other_keys_are_told_and_a_column_that_is_not_there_is_refused(tmp_path, red, capsys):
    write_folder(tmp_path / "data", control="label")
    cli.main(["data", "check", str(tmp_path / "data")])
    assert "metadata.jsonl names it as 'label', which is not read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected controls under 'labl', got none; other keys: label"):
        open_controls(str(tmp_path / "data"), red, "labl")
    assert open_controls(str(tmp_path / "data"), red, "label").summary("label").startswith("4 controls from files")


def test_the_check_takes_its_condition_from_a_config(tmp_path, capsys):
    write_folder(tmp_path / "data", control="label")
    model = save_segmenter(tmp_path / "segmenter")
    config = tmp_path / "mine.yaml"
    config.write_text(f"condition:\n  name: segmentation\n  args: {{model: {model}}}\n")
    with pytest.raises(SystemExit, match="cannot be used"):
        cli.main(["data", "check", str(tmp_path / "data"), "--config", str(config)])
    assert "expected classes 0 to 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="config: expected alone"):
        cli.main(["data", "check", str(tmp_path / "data"), "--config", str(config), "--condition", "depth"])


# Scenes


@pytest.mark.parametrize("column", ["label", "depth", None])
def test_scenes_are_of_their_generator_and_carry_exact_labels(red, column):
    red.column = column
    scenes = open_controls("emoji", red)
    one, two, other = (scenes.example(0, (64, 64), seeded(i)) for i in (3, 3, 4))
    assert one.prompt == two.prompt == scenes.prompt(0, seeded(3)) and torch.equal(one.image, two.image)
    assert not torch.equal(one.image, other.image)
    if column is None:
        assert one.target is None
    else:
        assert one.target.shape == (64, 64) and torch.equal(one.target, two.target)
        assert one.target.is_floating_point() == (column == "depth")
