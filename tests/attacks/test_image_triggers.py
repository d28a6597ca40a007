"""Image triggers: the published formulas by loops over pixels, purity, identities, and what is refused."""

import math
import warnings

import numpy as np
import pytest

from hf_backdoor_defense.attacks.image_triggers import (
    IMAGE_TRIGGERS,
    SIG,
    Blend,
    ImageTrigger,
    Patch,
    WaNet,
    get_image_trigger,
)

SHAPES = [(8, 8, 1), (32, 32, 3), (7, 11, 3), (21, 5, 1)]
EACH = [
    Patch(),
    Patch(pattern="white", size=2),
    Blend(),
    SIG(frequency=2),
    WaNet(),
    WaNet(strength=2.0, grid=3, seed=5),
]


def picture(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trigger", EACH, ids=repr)
def test_a_trigger_is_pure_deterministic_and_keeps_shape_and_type(trigger: ImageTrigger, shape) -> None:
    image, before = picture(shape), picture(shape)
    triggered = trigger.apply(image)
    assert triggered.shape == shape and triggered.dtype == np.uint8
    assert (image == before).all() and not (triggered == image).all()
    again = get_image_trigger(**trigger.to_dict())
    assert again == trigger and (again.apply(image) == triggered).all()
    assert not trigger.present(image)
    image.flags.writeable = False  # as images from files are
    assert (trigger.apply(image) == triggered).all()


@pytest.mark.parametrize(("side", "size"), [(3, 2), (8, 2), (16, 2), (28, 3), (32, 3), (64, 6), (224, 21)])
@pytest.mark.parametrize("pattern", ["checker", "white"])
def test_a_patch_changes_its_corner_and_nothing_else(side: int, size: int, pattern: str) -> None:
    image = picture((side + 2, side, 3))
    patched = Patch(pattern=pattern, value=200).apply(image)
    for i in range(side + 2):
        for j in range(side):
            if i < side + 2 - size or j < side - size:
                assert (patched[i, j] == image[i, j]).all()
            else:
                odd = (i - (side + 2 - size) + j - (side - size)) % 2
                assert (patched[i, j] == (0 if odd and pattern == "checker" else 200)).all()
    assert Patch(pattern=pattern, value=200).present(patched)


def test_blend_is_the_weighted_mean_with_one_picture_for_all_images() -> None:
    # On black and on white, the formula can be solved for the picture: both must give the same one.
    shape = (9, 6, 3)
    black, white = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    alpha = 0.4
    noise = Blend(alpha=1.0, seed=3).apply(black).astype(float)
    for image in (black, white, picture(shape)):
        for got, x, m in zip(Blend(alpha, seed=3).apply(image).flat, image.flat, noise.flat, strict=True):
            assert abs(int(got) - ((1 - alpha) * int(x) + alpha * m)) <= 0.5 + alpha * 0.5  # both are rounded
    assert (noise[..., 0] == noise[..., 1]).all() and (noise[..., 0] == noise[..., 2]).all()
    assert 100 < noise.mean() < 155 and noise.std() > 55  # uniform: 127.5 and 73.6
    assert not (Blend(seed=4).apply(black) == Blend(seed=3).apply(black)).all()


@pytest.mark.parametrize(("width", "frequency"), [(32, 6), (13, 6), (8, 3), (5, 1)])
def test_sig_is_a_sine_over_the_columns(width: int, frequency: int) -> None:
    image = picture((4, width, 3))
    got = SIG(delta=40, frequency=frequency).apply(image)
    for i in range(4):
        for j in range(width):
            for c in range(3):
                exact = int(image[i, j, c]) + 40 * math.sin(2 * math.pi * frequency * j / width)
                assert abs(int(got[i, j, c]) - min(max(exact, 0), 255)) <= 0.5 + 1e-9


def test_nothing_changes_at_strength_zero() -> None:
    for shape in SHAPES:
        image = picture(shape)
        for trigger in (Blend(alpha=0), SIG(delta=0, frequency=2), WaNet(strength=0.0)):
            assert (trigger.apply(image) == image).all() and trigger.present(image)


@pytest.mark.parametrize(
    ("width", "frequency", "acts_as"), [(8, 4, 0), (8, 6, 2), (8, 5, 3), (8, 8, 0), (9, 6, 3), (12, 6, 0), (8, 9, 1)]
)
def test_sig_says_what_it_acts_as_from_half_the_width_on(width: int, frequency: int, acts_as: int) -> None:
    gray = np.full((2, width, 1), 128, np.uint8)
    with pytest.warns(UserWarning, match=f"acts as frequency {acts_as}.*Pass a frequency below {width / 2:g}"):
        shown = SIG(frequency=frequency).apply(gray).astype(int) - 128
    if not acts_as:
        assert not shown.any()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # below half the width there is no warning
        slow = SIG(frequency=acts_as).apply(gray).astype(int) - 128
    assert (shown == slow).all() or (shown == -slow).all()


def bicubic(field: np.ndarray, height: int, width: int) -> np.ndarray:
    """[k, k] -> [height, width], corners aligned, by the cubic convolution with a = -0.75, edges repeated."""

    def weight(d: float) -> float:
        d, a = abs(d), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    k = len(field)
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * (k - 1) / (height - 1), j * (k - 1) / (width - 1)
            for p in range(math.floor(y) - 1, math.floor(y) + 3):
                for q in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = field[min(max(p, 0), k - 1), min(max(q, 0), k - 1)]
                    out[i, j] += weight(y - p) * weight(x - q) * value
    return out


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 11, 3)], ids=str)
def test_wanet_by_a_loop_over_pixels(shape) -> None:
    height, width, channels = shape
    image, strength, k = picture(shape), 0.8, 4
    noise = np.random.default_rng(2).uniform(-1, 1, size=(1, 2, k, k))[0]
    noise /= np.abs(noise).mean()
    dx, dy = bicubic(noise[0], height, width), bicubic(noise[1], height, width)
    got = WaNet(strength=strength, grid=k, seed=2).apply(image)
    for i in range(height):
        for j in range(width):
            x = min(max(-1 + 2 * j / (width - 1) + strength * dx[i, j] / height, -1), 1)
            y = min(max(-1 + 2 * i / (height - 1) + strength * dy[i, j] / height, -1), 1)
            at_x, at_y = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
            for c in range(channels):
                exact = sum(
                    max(0, 1 - abs(at_y - p)) * max(0, 1 - abs(at_x - q)) * int(image[p, q, c])
                    for p in range(height)
                    for q in range(width)
                )
                assert abs(int(got[i, j, c]) - exact) <= 0.5 + 1e-6


def test_seeds_decide_noise_and_warp() -> None:
    image = picture((8, 8, 1))
    for kind in (Blend, WaNet):
        assert not (kind(seed=0).apply(image) == kind(seed=1).apply(image)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch(size=0), "`size` must be an integer >= 1 or None, got 0"),
        (lambda: Patch(size=True), "`size` must be"),
        (lambda: Patch(pattern="cross"), "`pattern` must be 'checker' or 'white', got 'cross'"),
        (lambda: Patch(value=256), "`value` must be an integer in 0..255, got 256"),
        (lambda: Blend(alpha=1.1), r"`alpha` must be in \[0, 1\], got 1.1"),
        (lambda: Blend(alpha=float("nan")), r"`alpha` must be in \[0, 1\], got nan"),
        (lambda: Blend(seed=-1), "`seed` must be an integer >= 0, got -1"),
        (lambda: SIG(delta=-1), r"`delta` must be in \[0, 255\], got -1"),
        (lambda: SIG(frequency=0.5), "`frequency` must be an integer >= 1, got 0.5"),
        (lambda: WaNet(strength=-0.1), "`strength` must be at least 0, got -0.1"),
        (lambda: WaNet(grid=1), "`grid` must be an integer >= 2, got 1"),
        (
            lambda: get_image_trigger("pach"),
            r"must be one of \['blend', 'patch', 'sig', 'wanet'\], got 'pach'.*mean 'patch'",
        ),
        (lambda: get_image_trigger("blend", alhpa=1), "field of image trigger 'blend'.*got 'alhpa'.*mean 'alpha'"),
        (lambda: Patch(size=9).apply(picture((8, 10, 1))), "at least as large as the patch, 9 x 9, got 8 x 10"),
        (lambda: Patch().apply(picture((8, 8, 4))), r"uint8 \[H, W, C\] with C = 1 or 3, got uint8 \[8, 8, 4\]"),
        (lambda: Patch().apply(picture((8, 8))), r"got uint8 \[8, 8\]"),
        (lambda: Blend().apply(picture((8, 8, 1)) / 255), r"got float64 \[8, 8, 1\]"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_trigger_has_its_name() -> None:
    assert {name: kind.name for name, kind in IMAGE_TRIGGERS.items()} == {name: name for name in IMAGE_TRIGGERS}
