"""The formula behind the aesthetic judges, on what is known of a scene: contrast, composition, sharpness."""

import numpy as np

from alignkit.emoji.scenes import SIZE, Rendered, Scene

# mean and standard deviation of the parts over 4,000 scenes of the base's world, blurred as `sharpness` says
STANDARD = {"contrast": (0.492, 0.209), "composition": (-0.262, 0.098), "sharpness": (-0.403, 0.491)}
CENTRE = (0.5, 0.6)  # of a pleasing composition, as shares of width and height
COVERAGE = 0.3  # share of the picture that the sprites should cover


def contrast(rendered: Rendered) -> float:
    """Distance in RGB ([0, 1] each) between the sprites' mean colour and that of the rest."""
    image, on_sprite = rendered.image / 255, rendered.class_map > 0
    return float(np.linalg.norm(image[on_sprite].mean(0) - image[~on_sprite].mean(0)))


def composition(rendered: Rendered) -> float:
    """Minus the distance of the sprites' centre of mass from CENTRE, minus that of their area from COVERAGE."""
    rows, columns = np.nonzero(rendered.class_map)
    x, y = (columns.mean() + 0.5) / SIZE, (rows.mean() + 0.5) / SIZE
    return -float(np.hypot(x - CENTRE[0], y - CENTRE[1])) - abs(len(rows) / SIZE**2 - COVERAGE)


def parts(scene: Scene, rendered: Rendered) -> dict[str, float]:
    """The three parts, in units of their own; `rendered` should be the scene without its blur and noise."""
    return {"contrast": contrast(rendered), "composition": composition(rendered), "sharpness": -scene.blur}


def aesthetic(scene: Scene, rendered: Rendered) -> float:
    """Mean of the three standardised parts; 0 is an average scene. An empty scene has none: ValueError."""
    if not scene.objects or not (rendered.class_map > 0).any():
        raise ValueError("The aesthetic formula needs a scene with at least one visible sprite.")
    return float(np.mean([(value - STANDARD[k][0]) / STANDARD[k][1] for k, value in parts(scene, rendered).items()]))


def sample_blur(rng: np.random.Generator) -> float:
    """Half of the scenes are sharp, the others blurred by up to 1.5 pixels."""
    return float(rng.uniform(0.1, 1.5)) if rng.random() < 0.5 else 0.0
