"""Pictures as people have them: any size, turned by EXIF, grey, with alpha, of 16 bits. Read right, or refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import clause

try:
    from PIL import Image, ImageOps
except ImportError:
    raise InputError("pictures need Pillow; install it: pip install 'manyheads[vision]'.") from None

LEAST, MOST = 8, 50_000_000  # pixels of a side, and of a picture


def read_picture(path: str | Path) -> Float[np.ndarray, "H W 3"]:
    """A picture file as RGB in [0, 1], upright; what is transparent is white; of an animation the first frame.

    `InputError` for what is no picture, is damaged, has a side below 8 pixels, or more than 50 million pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a picture, such as a .png or .jpg.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about a size that is checked below
            opened = Image.open(path)
            width, height = opened.size
            if width * height > MOST or min(width, height) < LEAST:
                raise InputError(
                    f"{path} has {width} x {height} pixels; a picture has sides of at least {LEAST} and at most {MOST:,} pixels."
                )
            return _rgb(ImageOps.exif_transpose(opened))
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file raises
        raise InputError(f"cannot read {path} as a picture ({clause(error)}).") from None


def as_picture(values: Float[np.ndarray, "H W 3"] | Float[np.ndarray, "H W"]) -> Image.Image:
    """Numbers in [0, 1] as a Pillow image; what is outside is cut."""
    found = np.clip(np.nan_to_num(values), 0, 1)
    return Image.fromarray(np.round(255 * found).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class Letterboxed:
    """A picture inside a square: `pixels` `[3, S, S]`, and where in it a point of the picture is: `scale * xy + shift`."""

    pixels: Float[Tensor, "3 S S"]
    scale: float
    shift: tuple[float, float]

    def back(self, xy: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "... 2"]:
        """From points of the square to points of the picture, x first, in pixels."""
        return (np.asarray(xy) - np.array(self.shift)) / self.scale


def letterbox(picture: Float[np.ndarray, "H W 3"], size: int, fill: float = 0.5) -> Letterboxed:
    """The picture made as large as fits, its sides in proportion, in the middle of a square that is otherwise `fill`."""
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    h, w = max(1, round(scale * height)), max(1, round(scale * width))
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).float().permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (h, w), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (size - h) // 2, (size - w) // 2
    whole = torch.full((3, size, size), fill)
    whole[:, top : top + h, left : left + w] = resized
    return Letterboxed(whole, scale, (float(left), float(top)))


def _rgb(opened: Image.Image) -> Float[np.ndarray, "H W 3"]:
    if (
        opened.mode.startswith("I") or opened.mode == "F"
    ):  # 16 and 32 bits, or floating-point, which `convert` would cut off
        grey = np.asarray(opened, dtype=np.float64)
        low, high = (
            (0.0, 65535.0) if opened.mode.startswith("I;16") else (min(float(grey.min()), 0.0), float(grey.max()))
        )
        return np.repeat(((grey - low) / max(high - low, 1e-12))[..., None], 3, -1)
    if "A" in opened.getbands() or "transparency" in opened.info:
        over = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return np.asarray(opened.convert("RGB"), dtype=np.float64) / 255
