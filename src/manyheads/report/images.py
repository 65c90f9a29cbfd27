"""Pictures inside a page: an image as a data URI, so that a page stays one file and asks for nothing."""

from __future__ import annotations

import base64
import struct
import zlib

from jaxtyping import Float
from torch import Tensor


def png_uri(image: Float[Tensor, "C H W"]) -> str:
    """The image as a data URI, its values spread from black to white."""
    pixels = image.detach().float().cpu()
    pixels = pixels if len(pixels) == 3 else pixels.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = float(pixels.min()), float(pixels.max())
    rows = ((pixels - low) / max(high - low, 1e-12) * 255).round().byte().movedim(0, -1).numpy()
    height, width = rows.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()
