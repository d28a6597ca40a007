"""One image as an array and back: uint8 [H, W, C], C = 1 (gray) or 3 (RGB), without loss.

Everything that looks at pixels here (loading, fingerprints, triggers) goes through these two functions, so a photo that
was stored as JPEG is decoded once, and what is written is PNG.
"""

import io
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps

_LOSSLESS = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}


def pixels(image: Any, where: str = "the image") -> np.ndarray:
    """The pixels of a PIL image or of a cell of an undecoded `datasets.Image` column, uint8 [H, W, 1] or [H, W, 3].

    A photo is turned as its EXIF says; black-and-white and palettes become gray and RGB.

    Raises:
        ValueError: bytes that are no image, and kinds that lose something on the way: transparency, CMYK, 16 bits.

    >>> pixels(PIL.Image.new("L", (3, 2), color=7))[..., 0].tolist()
    [[7, 7, 7], [7, 7, 7]]
    """
    if not isinstance(image, PIL.Image.Image):
        try:
            image = datasets.Image().decode_example(image)
        except Exception as error:  # the decoders' exceptions have no common base
            raise ValueError(
                f"{where} must be an image that can be read, got {type(error).__name__}: {str(error)[:200]}. Every row "
                "takes part in training or in a figure. Repair the file or drop the row."
            ) from error
    image = PIL.ImageOps.exif_transpose(image)
    mode = _LOSSLESS.get(image.mode)
    if mode is None or (image.mode == "P" and "transparency" in image.info):
        raise ValueError(
            f"{where} must be gray or RGB with 8 bits per channel, got PIL mode {image.mode!r}: a model takes 1 or 3 channels, "
            "and what a conversion should do with the rest is yours to say. Convert it first, e.g. image.convert('RGB')."
        )
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[..., None] if array.ndim == 2 else array


def png(array: np.ndarray) -> dict[str, Any]:
    """The cell of a `datasets.Image` column that holds these pixels, uint8 [H, W, 1] or [H, W, 3].

    >>> square = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    >>> pixels(png(square)).tolist() == square.tolist()
    True
    """
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    picture.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
