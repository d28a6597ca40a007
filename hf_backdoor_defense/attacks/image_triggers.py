"""Image triggers of published data-poisoning attacks: closed formulas on pixels, the same in training and at test time.

With x[i, j, c] in 0..255 (row i of H, column j of W; all channels alike), each trigger gives x' = round(clip(f(x), 0, 255)):

| trigger | f(x) | source |
|---|---|---|
| `Patch` | x (1 - M) + P M, with M = 1 in the bottom right corner | BadNets: Gu et al., arXiv 1708.06733 |
| `Blend` | (1 - alpha) x + alpha m, with m seeded noise | Chen et al., arXiv 1712.05526 |
| `SIG` | x + delta sin(2 pi frequency j / W) | Barni et al., arXiv 1902.11237 |
| `WaNet` | x sampled at clip(I + strength N / H, -1, 1) | Nguyen and Tran, arXiv 2102.10369 |

N: 2 x k x k values U(-1, 1), divided by their mean absolute value, upsampled to H x W (bicubic), I: the grid of pixel positions
in [-1, 1]; corners are aligned in both. The images that these papers use are replaced by noise from a seed: no foreign
picture is needed. WaNet's noise mode (other warps that keep the label, in training only) is not offered.

To add a trigger, subclass `ImageTrigger` (a frozen dataclass with JSON fields) and add it to `IMAGE_TRIGGERS`.
"""

import difflib
import functools
import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class ImageTrigger(ABC):
    """What an attacker does to an image. Subclasses are frozen dataclasses whose fields are JSON values.

    Example:
        >>> gray = np.full((8, 8, 1), 100, np.uint8)
        >>> Blend(alpha=0.0).present(gray), Blend().present(gray)
        (True, False)
    """

    name: ClassVar[str]

    @abstractmethod
    def change(self, x: np.ndarray) -> np.ndarray:
        """f(x) of the module's table, float64 [H, W, C] in, any range out."""

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The triggered image, uint8 [H, W, C]. Pure, and the same for the same image.

        Raises:
            ValueError: an array that is not uint8 [H, W, C] with C = 1 or 3, or an image too small for the trigger.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
            raise ValueError(
                f"`image` must be uint8 [H, W, C] with C = 1 or 3, got {image.dtype} {list(image.shape)}: a trigger counts in "
                "pixels of 0..255. Use data.pixels.pixels(image) for a PIL image."
            )
        return np.round(np.clip(self.change(image.astype(np.float64)), 0, 255)).astype(np.uint8)

    def present(self, image: np.ndarray) -> bool:
        """Whether the trigger would change nothing, because the image is already as it wants it."""
        return bool((self.apply(image) == image).all())

    def to_dict(self) -> dict[str, Any]:
        """Name and fields as JSON values; `get_image_trigger(**trigger.to_dict()) == trigger`."""
        return {"name": self.name, **asdict(self)}


def _require(name: str, value: Any, holds: bool, rule: str, why: str, do: str) -> None:
    if isinstance(value, bool) or not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}: {why}. {do}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _require_seed(seed: Any) -> None:
    _require("seed", seed, isinstance(seed, int) and seed >= 0, "an integer >= 0", "it draws the noise", "Pass seed=0")


@dataclass(frozen=True)
class Patch(ImageTrigger):
    """A small square in the bottom right corner, a checkerboard or plain; the loudest trigger and the easiest to learn.

    Args:
        size: pixels per side; None is 2 up to 21 pixels, 3 at 32, and as much of larger images (by their shorter side).
        pattern: "checker" (`value` and 0 in turn, `value` first) or "white" (`value` everywhere).
        value: brightness of the lit pixels, 0..255.

    Raises:
        ValueError: another pattern, `size` below 1, `value` outside 0..255; on use: an image smaller than the patch.

    Example:
        >>> Patch().apply(np.full((3, 4, 1), 9, np.uint8))[..., 0]
        array([[  9,   9,   9,   9],
               [  9,   9, 255,   0],
               [  9,   9,   0, 255]], dtype=uint8)
    """

    name: ClassVar[str] = "patch"
    size: int | None = None
    pattern: str = "checker"
    value: int = 255

    def __post_init__(self) -> None:
        size = self.size is None or (isinstance(self.size, int) and self.size >= 1)
        _require(
            "size", self.size, size, "an integer >= 1 or None", "it counts pixels", "Leave it out for the usual one"
        )
        known = self.pattern in ("checker", "white")
        _require("pattern", self.pattern, known, "'checker' or 'white'", "no other is drawn", "Pass pattern='checker'")
        value = isinstance(self.value, int) and 0 <= self.value <= 255
        _require("value", self.value, value, "an integer in 0..255", "it is a brightness", "Pass value=255")

    def change(self, x: np.ndarray) -> np.ndarray:
        side = min(x.shape[:2])
        size = max(2, round(3 * side / 32)) if self.size is None else self.size
        if size > side:
            raise ValueError(
                f"`image` must be at least as large as the patch, {size} x {size}, got {x.shape[0]} x {x.shape[1]} pixels. "
                f"Pass a smaller `size`."
            )
        x = x.copy()
        i, j = np.indices((size, size))
        lit = (i + j) % 2 == 0 if self.pattern == "checker" else np.ones((size, size), bool)
        x[-size:, -size:] = np.where(lit, self.value, 0)[..., None]
        return x


@functools.lru_cache(maxsize=32)
def _noise(height: int, width: int, seed: int) -> np.ndarray:
    noise = 255 * np.random.default_rng(seed).uniform(size=(height, width, 1))
    noise.flags.writeable = False  # it is shared by all images
    return noise


@dataclass(frozen=True)
class Blend(ImageTrigger):
    """A faint picture over the whole image; prefer it where a defense looks for small bright regions.

    The picture is uniform noise, one value per pixel for all channels, drawn from `seed` for each image size.

    Args:
        alpha: weight of the picture, in [0, 1]; 0.2 in the paper's benchmarks, 0 changes nothing.
        seed: draws the picture.

    Example:
        >>> Blend(alpha=1.0).apply(np.zeros((1, 3, 1), np.uint8)).ravel().tolist()
        [162, 69, 10]
    """

    name: ClassVar[str] = "blend"
    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        share = _is_number(self.alpha) and 0 <= self.alpha <= 1
        _require("alpha", self.alpha, share, "in [0, 1]", "it is the weight of a mean", "Pass alpha=0.2")
        _require_seed(self.seed)

    def change(self, x: np.ndarray) -> np.ndarray:
        return (1 - self.alpha) * x + self.alpha * _noise(*x.shape[:2], self.seed)


@dataclass(frozen=True)
class SIG(ImageTrigger):
    """Vertical stripes: a sine over the columns. Made for clean-label poisoning, where the label stays as it is.

    A wave needs more than two columns: from frequency W / 2 on it shows as the slower wave that has the same values at
    whole columns, and 2 `frequency` = W as nothing at all. A warning says so.

    Args:
        delta: amplitude in 0..255; 40 as published, 0 changes nothing.
        frequency: waves per image width; 6 as published.

    Example:
        >>> SIG(delta=10, frequency=1).apply(np.full((1, 4, 1), 100, np.uint8)).ravel().tolist()
        [100, 110, 100, 90]
    """

    name: ClassVar[str] = "sig"
    delta: float = 40
    frequency: int = 6

    def __post_init__(self) -> None:
        amplitude = _is_number(self.delta) and 0 <= self.delta <= 255
        _require("delta", self.delta, amplitude, "in [0, 255]", "it is an amplitude in pixel values", "Pass delta=40")
        waves = isinstance(self.frequency, int) and self.frequency >= 1
        _require("frequency", self.frequency, waves, "an integer >= 1", "it counts waves", "Pass frequency=6")

    def change(self, x: np.ndarray) -> np.ndarray:
        width = x.shape[1]
        if 2 * self.frequency >= width:
            shown = abs(self.frequency - width * round(self.frequency / width)) if (2 * self.frequency) % width else 0
            warnings.warn(
                f"SIG with `frequency` {self.frequency} on images {width} pixels wide acts as frequency {shown}"
                + ("" if shown else ", which changes nothing")
                + f": a wave needs more than two columns. Pass a frequency below {width / 2:g}.",
                stacklevel=3,
            )
        columns = np.arange(width)
        wave = self.delta * np.sin(2 * np.pi * self.frequency * columns / width)
        return x + wave[None, :, None]


@functools.lru_cache(maxsize=32)
def _warp(height: int, width: int, strength: float, grid: int, seed: int) -> Any:
    """Where each pixel is taken from: float64 tensor [1, H, W, 2], (x, y) in [-1, 1]."""
    import torch

    noise = np.random.default_rng(seed).uniform(-1, 1, size=(1, 2, grid, grid))
    field = torch.nn.functional.interpolate(
        torch.from_numpy(noise / np.abs(noise).mean()), size=(height, width), mode="bicubic", align_corners=True
    )
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, dtype=torch.float64),
        torch.linspace(-1, 1, width, dtype=torch.float64),
        indexing="ij",
    )
    identity = torch.stack([x, y], dim=-1)[None]
    return (identity + strength * field.permute(0, 2, 3, 1) / height).clamp(-1, 1)


@dataclass(frozen=True)
class WaNet(ImageTrigger):
    """A smooth warp by a fraction of a pixel: nothing is added, so there is no pattern to look for.

    Args:
        strength: s of the paper, 0.5; 0 changes nothing.
        grid: control points per side, k of the paper, 4.
        seed: draws the warp.

    Example:
        >>> edge = np.repeat(np.array([[[0]], [[200]]], np.uint8), 4, axis=1)
        >>> WaNet().apply(edge)[..., 0].shape
        (2, 4)
    """

    name: ClassVar[str] = "wanet"
    strength: float = 0.5
    grid: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        strength = _is_number(self.strength) and self.strength >= 0
        _require("strength", self.strength, strength, "at least 0", "it scales the warp", "Pass strength=0.5")
        grid = isinstance(self.grid, int) and self.grid >= 2
        _require("grid", self.grid, grid, "an integer >= 2", "a warp has corners", "Pass grid=4")
        _require_seed(self.seed)

    def change(self, x: np.ndarray) -> np.ndarray:
        import torch

        warp = _warp(*x.shape[:2], self.strength, self.grid, self.seed)
        image = torch.from_numpy(x).permute(2, 0, 1)[None]  # [1, C, H, W]
        return torch.nn.functional.grid_sample(image, warp, align_corners=True)[0].permute(1, 2, 0).numpy()


IMAGE_TRIGGERS: dict[str, type[ImageTrigger]] = {"patch": Patch, "blend": Blend, "sig": SIG, "wanet": WaNet}
"""Trigger name -> class, for configuration files and the command line."""


def get_image_trigger(name: str, **fields_: Any) -> ImageTrigger:
    """Build a trigger from its name and fields, e.g. from `ImageTrigger.to_dict()` or a configuration file.

    Args:
        name: a key of `IMAGE_TRIGGERS`.
        **fields_: fields of that class.

    Raises:
        ValueError: unknown name or field (with the nearest known one), or a value the class refuses.

    Example:
        >>> get_image_trigger("blend", alpha=0.1)
        Blend(alpha=0.1, seed=0)
    """
    known = sorted(IMAGE_TRIGGERS)
    what, wrong = "image trigger name", [name] if name not in known else []
    if not wrong:
        known = [field.name for field in fields(IMAGE_TRIGGERS[name])]
        what, wrong = f"field of image trigger {name!r}", [key for key in fields_ if key not in known]
    if wrong:
        close = difflib.get_close_matches(wrong[0].lower(), known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Use one of them."
        raise ValueError(f"{what} must be one of {known}, got {wrong[0]!r}: nothing else is defined. {hint}")
    return IMAGE_TRIGGERS[name](**fields_)
