"""Conditions: closed forms, identities, gradients, and what is refused."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from kornia.filters import canny
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, GLPNConfig, GLPNImageProcessor, SegformerConfig, SegformerImageProcessor

from alignkit.conditions import CONDITIONS, Condition, build_condition, model_input, probe_condition, score
from alignkit.conditions.models import preprocessing
from alignkit.conditions.segmentation import IGNORE, distinct_colors
from alignkit.emoji import resolve
from alignkit.random_init import toy_clip
from alignkit.rewards import probe_images
from tests.toy_conditions import (
    save_depth_anything,
    save_dpt_hybrid,
    save_dpt_on_dinov2,
    save_estimator,
    save_plain_dpt,
    save_segmenter,
    save_upernet,
)

SIZE = 48


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict]:
    """Arguments of each condition of ours, with small random models."""
    folder = tmp_path_factory.mktemp("judges")
    args = {name: {} for name in CONDITIONS}
    args["segmentation"] = {"model": save_segmenter(folder / "segmenter")}
    args["depth"] = {"model": save_estimator(folder / "estimator")}
    return args


@pytest.fixture
def make(models):
    return lambda name, **args: build_condition(name, **models[name] | args)


def pictures(number: int = 2, seed: int = 0) -> torch.Tensor:
    """Shapes with sharp edges, [N, 3, SIZE, SIZE] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(number, 3, 6, 6, generator=generator), SIZE, mode="nearest")


# The shape of every condition


@pytest.mark.parametrize("name", CONDITIONS)
def test_shapes_and_ranges(make, name):
    condition, images = make(name), pictures(3)
    targets = condition.extract(images)
    assert targets.shape == (3, SIZE, SIZE) and not targets.requires_grad
    control = condition.control(targets)
    assert control.shape == (3, 3, SIZE, SIZE) and control.min() >= 0 and control.max() <= 1
    losses = condition(images.requires_grad_(), targets)
    assert losses.shape == (3,) and losses.dtype == torch.float32 and losses.requires_grad
    assert not any(parameter.requires_grad for parameter in condition.parameters())


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_sample_depends_on_itself_alone(make, name):
    condition, images = make(name), pictures(3)
    targets = condition.extract(images.flip(0))
    alone = torch.cat([condition(images[i : i + 1], targets[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(condition(images, targets), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CONDITIONS if name != "segmentation"])
def test_an_image_has_no_distance_to_its_own_target(make, name):
    condition, images = make(name), pictures()
    assert condition(images, condition.extract(images)).abs().max() < 1e-10


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_perfect_image_has_perfect_scores(make, name):
    """The released scorers of depth and line art fail this."""
    condition, images = make(name), pictures(4)
    for metric, value in score(condition, images, condition.extract(images), batch_size=3).items():
        assert value == pytest.approx(0 if metric == "RMSE" else 1, abs=1e-6), metric


@pytest.mark.parametrize("name", CONDITIONS)
def test_gradients_by_finite_differences(make, name):
    """In float64, along a random direction."""
    condition = make(name).double()
    images = probe_images(2, 24, 24).double()
    targets = condition.extract(images.flip(0))
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(x):
        return condition(x, targets).sum()

    (gradient,) = torch.autograd.grad(loss(images.requires_grad_()), images)
    step = 1e-6
    with torch.no_grad():
        expected = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
    # a non-maximum suppression that switches within the step would spoil it for canny: these pictures have none
    assert float((gradient * direction).sum()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_probe_passes_ours(make, name):
    probe_condition(make(name), SIZE, SIZE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Rounded", "Rounded: the score has no gradient"),
        ("Unusable", "declares differentiable = False"),
        ("Detached", "gradient of image 0 of 2 is zero"),
    ],
)
def test_the_probe_refuses(name, message):
    with pytest.raises(ValueError, match=message):
        probe_condition(build_condition(f"tests.toy_conditions:{name}"), 16, 16)


def test_inputs_are_checked():
    condition, images = build_condition("tests.toy_conditions:Red"), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected targets \[2, 8, 8\].*got \[2, 4, 4\]"):
        condition(images, torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"):
        condition(2 * images + 1, torch.zeros(2, 8, 8))
    condition.train()
    assert not condition.training
    with pytest.raises(NotImplementedError, match="predict"):
        Condition()(images, torch.zeros(2, 8, 8))


@pytest.mark.parametrize("name", ["softedge", "lineart"])
def test_every_value_of_an_8_bit_map_and_its_inverse_is_read(make, name):
    """White lines on black or black on white: no value wraps or moves."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    condition = make(name)
    expected = torch.arange(256).reshape(16, 16) / 255
    torch.testing.assert_close(condition.read(Image.fromarray(values)), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(condition.read(Image.fromarray(255 - values)), 1 - expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(condition.read(Image.fromarray(values).convert("LA")), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["softedge", "lineart"])
def test_a_map_of_one_bit_is_white_on_black_and_one_of_16_is_refused(make, name):
    """PNG optimisers save lines with one bit a pixel; divided by 255, they would all but vanish."""
    lines = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    assert make(name).read(Image.fromarray(lines).convert("1")).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="gray values of 0 to 255, got up to 65535"):
        make(name).read(Image.fromarray(257 * lines.astype(np.uint16)))


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match="nearest is 'depth'"):
        build_condition("dept")
    with pytest.raises(ValueError, match="subclass of alignkit.conditions.Condition"):
        build_condition("tests.toy_rewards:Red")
    with pytest.raises(ValueError, match="is a judge of the evaluator"):
        build_condition("depth", model="emoji/evaluator/depth")
    with pytest.raises(ValueError, match="is a judge of the evaluator"):
        build_condition("depth", model=resolve("emoji/evaluator/depth"))
    with pytest.raises(ValueError, match="could not be built"):
        build_condition("canny", threshold=1)
    with pytest.raises(ValueError, match="low_threshold <= high"):
        build_condition("canny", low_threshold=0.3)


# Segmentation


def test_cross_entropy_ignores_what_is_not_labelled(make):
    segmentation = make("segmentation")
    targets = torch.randint(5, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    logits = 30.0 * F.one_hot(targets, 5).permute(0, 3, 1, 2)
    assert segmentation.compare(logits, targets).max() < 1e-3
    holes = targets.clone()
    holes[0, :4], holes[1] = IGNORE, IGNORE
    other = logits.clone()
    other[0, :, :4] = -logits[0, :, :4]  # wrong, where nothing is said
    losses = segmentation.compare(other, holes)
    assert losses[0] < 1e-3 and losses[1] == 0  # nothing labelled: 0, not NaN
    uniform = segmentation.compare(torch.zeros(1, 5, 8, 8), holes[:1])
    assert float(uniform) == pytest.approx(np.log(5), rel=1e-6)  # the mean over labelled pixels
    assert segmentation.control(holes)[0, :, :4].max() == 0


def test_miou_by_hand(make):
    """Two images, two classes: class 0 has intersection 3 of union 6, class 1 has 2 of 5; means of images differ."""
    metric = make("segmentation").metrics()["mIoU"]
    extracted = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [1, 1]]])
    targets = torch.tensor([[[0, 0], [0, 1]], [[1, 0], [0, 1]]])
    metric.update(extracted[:1], targets[:1])
    metric.update(extracted[1:], targets[1:])
    assert float(metric.compute()) == pytest.approx((3 / 6 + 2 / 5) / 2, abs=1e-6)
    ignored = torch.where(extracted == targets, targets, IGNORE)
    metric.reset()
    metric.update(extracted, ignored)
    assert float(metric.compute()) == pytest.approx(1)


@pytest.mark.parametrize("number, apart", [(1, 0.4), (2, 0.4), (21, 0.4), (150, 0.16), (259, 0.14), (1000, 0.08)])
def test_colors_differ(number, apart):
    """In what a ControlNet can see, also from the black of what is unlabelled; each is a colour of 8 bits."""
    colors = distinct_colors(number)
    assert colors.shape == (number, 3) and torch.equal(colors, (255 * colors).round() / 255)
    distance = torch.pdist(torch.cat([colors, torch.zeros(1, 3)]))
    assert colors.min() >= 0 and colors.max() <= 1 and distance.min() > apart


def test_a_palette_is_read_as_it_was_saved(make, tmp_path):
    segmentation = make("segmentation")
    segmentation.save(tmp_path)
    again = make("segmentation", palette=str(tmp_path / "palette.json"))
    assert torch.equal(again.palette, segmentation.palette) and segmentation.palette.unique(dim=0).shape[0] > 5


def test_a_palette_of_ones_own(make, tmp_path):
    path = tmp_path / "palette.json"
    path.write_text(json.dumps([[i, 0, 255] for i in range(5)]))
    control = make("segmentation", palette=str(path)).control(torch.tensor([[[0, 4, IGNORE]]]))
    assert torch.equal(
        (255 * control[0, :, 0]).round().int().T, torch.tensor([[0, 0, 255], [4, 0, 255], [0, 0, 0]]).int()
    )
    path.write_text("[[1, 2, 3]]")
    with pytest.raises(ValueError, match="expected 5 colours"):
        make("segmentation", palette=str(path))


def test_label_files(make):
    segmentation = make("segmentation")
    labels = np.array([[0, 4], [IGNORE, 2]], dtype=np.uint8)
    assert segmentation.read(Image.fromarray(labels)).tolist() == labels.tolist()
    assert segmentation.read(Image.fromarray(labels.astype(np.uint16))).dtype == torch.int64
    with pytest.raises(ValueError, match="mode P: colours do not survive"):
        segmentation.read(Image.fromarray(labels).convert("P"))
    with pytest.raises(ValueError, match="mode RGB"):
        segmentation.read(Image.fromarray(labels).convert("RGB"))
    with pytest.raises(ValueError, match=r"classes 0 to 4.*got \[5, 9\]"):
        segmentation.read(Image.fromarray(np.array([[5, 9, 1]], dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"classes 0 to 4.*got \[-1\]"):
        segmentation.read(Image.fromarray(np.array([[-1, 0]], dtype=np.int32)))


def tiny_swin():
    from transformers import SwinConfig

    return SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def test_oneformer_is_told_its_task(tmp_path):
    """As its own processor writes it; the padding of the text is 0."""
    from transformers import (
        OneFormerConfig,
        OneFormerForUniversalSegmentation,
        OneFormerImageProcessor,
        OneFormerProcessor,
    )

    torch.manual_seed(0)
    config = OneFormerConfig(
        backbone_config=tiny_swin(), conv_dim=32, mask_dim=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=3, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        query_dec_layers=1, num_labels=5, is_training=False,
    )  # fmt: skip
    model = OneFormerForUniversalSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = toy_clip(77)
    tokenizer.save_pretrained(tmp_path)
    segmentation = build_condition("segmentation", model=str(tmp_path))
    processor = SimpleNamespace(tokenizer=tokenizer)
    told = OneFormerProcessor._preprocess_text(processor, ["the task is semantic"], config.task_seq_len)
    assert torch.equal(segmentation.task, told) and not told[0, -1]
    images = pictures(2)
    with torch.no_grad():
        output = model(model_input(images, **segmentation.input(images)), told.repeat(2, 1))
        output.masks_queries_logits = F.interpolate(output.masks_queries_logits, (SIZE, SIZE), mode="bilinear")
    expected = OneFormerImageProcessor.post_process_semantic_segmentation(None, output)
    assert (segmentation.extract(images) == torch.stack(expected)).float().mean() > 0.999
    probe_condition(segmentation, 32, 32)


def test_universal_segmenters_agree_with_transformers(tmp_path):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
    )

    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=tiny_swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, num_labels=5,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    segmentation = build_condition("segmentation", model=str(tmp_path))
    images = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        output = model((images - mean) / std)
    expected = Mask2FormerImageProcessor().post_process_semantic_segmentation(output)[0]
    assert (segmentation.extract(images)[0] == expected).float().mean() > 0.999
    probe_condition(segmentation, 32, 32)


# Depth


def test_depth_is_compared_up_to_scale(make):
    depth = make("depth")
    a, b = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(depth.compare(7 * a, b / 3), depth.compare(a, b), rtol=1e-5, atol=1e-7)
    assert (depth.compare(a + 1, b) - depth.compare(a, b)).abs().min() > 1e-3  # an offset counts ...
    ranged = make("depth", normalise="range")
    torch.testing.assert_close(ranged.compare(7 * a + 1, b), ranged.compare(a, b), rtol=1e-5, atol=1e-6)  # ... or not
    for constant in (torch.zeros(1, 4, 4), torch.ones(1, 4, 4)):
        for condition in (depth, ranged):
            x = constant.clone().requires_grad_()
            condition.compare(x, constant).sum().backward()
            assert x.grad.isfinite().all()


def test_depth_rmse_by_hand(make):
    metric = make("depth").metrics()["RMSE"]
    metric.update(torch.tensor([[[1.0, 0.5]], [[1.0, 1.0]]]), torch.tensor([[[2.0, 2.0]], [[3.0, 3.0]]]))
    assert float(metric.compute()) == pytest.approx(255 * 0.5 / np.sqrt(2) / 2)  # mean of 255 sqrt(0.125) and 0


def test_depth_files(make):
    depth = make("depth")
    assert depth.read(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))).tolist() == [[0, 65535]]
    gray = np.arange(4, dtype=np.uint8).reshape(2, 2)
    assert depth.read(Image.fromarray(gray).convert("RGB")).tolist() == gray.tolist()
    with pytest.raises(ValueError, match="constant 7"):
        depth.read(Image.fromarray(np.full((2, 2), 7, dtype=np.uint8)))
    with pytest.raises(ValueError, match="colour picture"):
        depth.read(Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)))
    with pytest.raises(ValueError, match="got a picture of mode CMYK"):  # a JPEG may be
        depth.read(Image.new("CMYK", (2, 2)))
    with pytest.raises(ValueError, match="not negative"):
        depth.read(Image.fromarray(np.array([[-1.0, 2.0]], dtype=np.float32)))


# Edges


def test_canny_is_kornias(make):
    condition, images = make("canny"), pictures(3)
    magnitude, edges = (torch.cat(parts) for parts in zip(*(canny(i, 0.1, 0.2) for i in images.split(1)), strict=True))
    targets = condition.extract(images)
    torch.testing.assert_close(targets, magnitude[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(condition.control(targets)[:, :1], edges)
    assert 0 < edges.mean() < 0.5
    with pytest.raises(ValueError, match="not from a file"):
        condition.read(Image.new("L", (2, 2)))


def test_hysteresis_follows_a_weak_line_to_a_strong_pixel(make):
    magnitude = torch.zeros(1, 5, 9)
    magnitude[0, 1, 1:8], magnitude[0, 1, 7], magnitude[0, 4, 0:3] = 0.15, 0.3, 0.15
    edges = make("canny").edges(magnitude)
    assert edges[0, 1].tolist() == [False] + [True] * 7 + [False] and not edges[0, 4].any()


@pytest.mark.parametrize("name", ["softedge", "lineart"])
def test_edges_are_where_the_picture_changes(make, name):
    image = torch.full((1, 3, SIZE, SIZE), 0.8)
    image[..., SIZE // 2] = 0.1  # a dark line
    edges = make(name).extract(image)[0]
    assert edges[:, SIZE // 2 - 2 : SIZE // 2 + 3].amax(1).min() > 0.4
    assert edges[:, : SIZE // 4].max() < 0.1


# Models' inputs


@pytest.mark.parametrize("size", [16, 24])
def test_preprocessing_matches_the_image_processor(tmp_path, size):
    """On 8-bit images, to 2 of 255."""
    SegformerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    array = (255 * pictures(1)[0, :, :size, :size]).round().byte()
    expected = AutoImageProcessor.from_pretrained(tmp_path)(array, return_tensors="pt").pixel_values
    images = array[None].float() / 255
    arguments = preprocessing(str(tmp_path), SegformerConfig())(images)
    difference = (model_input(images, **arguments) - expected) * arguments["std"]
    assert difference.abs().max() < 2 / 255


@pytest.mark.parametrize(
    ("processor", "model"),
    [(GLPNImageProcessor(), GLPNConfig()), (SegformerImageProcessor(do_normalize=False), SegformerConfig())],
)
def test_what_a_processor_does_not_normalise_stays_as_it_is(tmp_path, processor, model):
    processor.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    arguments = preprocessing(str(tmp_path), model, resolution=32)(images)
    assert torch.equal(model_input(images, **arguments), images)


def test_model_input_keeps_the_aspect():
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    for size, expected in [((50, 100), (28, 56)), ((100, 50), (56, 28)), ((30, 30), (28, 28))]:
        assert model_input(torch.rand(1, 3, *size), 28, 14, "bicubic", mean, std).shape[-2:] == expected
    images = torch.rand(1, 3, 20, 20)
    assert torch.equal(model_input(images, None, 1, "bicubic", mean, std), images)


JUDGES = {
    "dpt_hybrid": ("depth", save_dpt_hybrid),
    "plain_dpt": ("depth", save_plain_dpt),
    "dpt_on_dinov2": ("depth", save_dpt_on_dinov2),
    "depth_anything": ("depth", save_depth_anything),
    "upernet": ("segmentation", save_upernet),
}


@pytest.mark.parametrize("judge", JUDGES)
def test_judges_of_the_real_configs_take_any_shape(tmp_path, judge):
    """A wide image has a map of its own shape, and a gradient: what aspect buckets need."""
    name, save = JUDGES[judge]
    condition = build_condition(name, model=save(tmp_path))
    for size in ((64, 64), (48, 80), (80, 48)):
        assert condition.extract(probe_images(1, *size)).shape == (1, *size)
        probe_condition(condition, *size)


def test_a_model_of_one_size_sees_what_its_own_processor_makes_of_another_shape(tmp_path):
    """On a wide 8-bit image, to 2 of 255; another resolution is refused."""
    path = save_dpt_hybrid(tmp_path)
    depth = build_condition("depth", model=path)
    array = (255 * pictures(1)[0, :, :24, :36]).round().byte()
    expected = AutoImageProcessor.from_pretrained(path)(array, return_tensors="pt").pixel_values
    arguments = depth.input(array[None] / 255)
    given = model_input(array[None] / 255, **arguments)
    assert given.shape == expected.shape == (1, 3, 64, 64)
    assert ((given - expected) * arguments["std"]).abs().max() < 2 / 255
    with pytest.raises(ValueError, match="takes images of 64 x 64 alone: leave it null"):
        build_condition("depth", model=path, resolution=128)


def test_a_plain_dpt_sees_squares_of_the_size_that_one_asks_for(tmp_path):
    for resolution, side in ((None, 64), (48, 48)):
        depth = build_condition("depth", model=save_plain_dpt(tmp_path), resolution=resolution)
        images = probe_images(1, 24, 36)
        assert model_input(images, **depth.input(images)).shape == (1, 3, side, side)


def test_statistics_of_pixels_up_to_255_and_a_multiple_to_pad_to_are_read(tmp_path):
    """To rounding what the model's own processor makes of an image whose sides need no padding."""
    path = save_dpt_on_dinov2(tmp_path)
    depth = build_condition("depth", model=path)
    array = (255 * pictures(1)[0, :, :28, :28]).round().byte()
    expected = AutoImageProcessor.from_pretrained(path)(array, return_tensors="pt").pixel_values
    images = array[None] / 255
    torch.testing.assert_close(model_input(images, **depth.input(images)), expected, rtol=0, atol=1e-5)
    assert model_input(probe_images(1, 30, 45), **depth.input(images)).shape == (1, 3, 28, 42)


def test_the_page_of_the_docs_runs(tmp_path, monkeypatch):
    """The class and the YAML of docs/conditions.md, built from the folder that one works in."""
    text = (Path(__file__).parent.parent / "docs" / "conditions.md").read_text()
    code, config = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "yaml"))
    (tmp_path / "my_conditions.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    condition = build_condition(**yaml.safe_load(config)["condition"])
    probe_condition(condition, 16, 16)
    assert condition.control(condition.extract(torch.rand(1, 3, 8, 8))).shape == (1, 3, 8, 8)
