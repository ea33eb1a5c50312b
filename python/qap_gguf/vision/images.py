"""Pictures of any kind that people hold in their hands, as RGB arrays that the encoder takes.

Pillow decodes: the first frame of an animation or of a file of several pages; EXIF (or XMP) orientation is applied;
transparency is laid on white; 16 bits a channel are scaled to 8; colour profiles are ignored, as Pillow does. Limits:

- pixels: Pillow's own guard against decompression bombs (``PIL.Image.MAX_IMAGE_PIXELS``, 89,478,485 unless a program
  sets another), which is an error here, not a warning, and is asked before anything is decoded;
- sides: 46,000 pixels, where upstream asserts;
- files: 512 MiB, regular ones (a pipe or device could last forever);
- kinds: not those for which Pillow starts another program or has no decoder of its own (``REFUSED_KINDS``).
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from qap_gguf.errors import ImageError

Pixels: TypeAlias = npt.NDArray[np.uint8]
#: What may stand for a picture: a path, the bytes of a file, a Pillow image, or a uint8 array (height, width, 3).
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Pixels"

#: Bytes of a file, or of bytes that are handed over.
MAX_BYTES = 512 * 2**20
#: EPS runs Ghostscript, a programming language; the others are containers whose decoder is somebody else's.
REFUSED_KINDS = frozenset({"EPS", "WMF", "GRIB", "BUFR", "HDF5", "MPEG"})
_MAX_SIDE = 46_000  # upstream asserts on larger sides (clip.h, clip_image_size::area)
#: EXIF orientation -> how to set the picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    limit = min(Image.MAX_IMAGE_PIXELS or 2**62, max_pixels or 2**62)
    if width > _MAX_SIDE or height > _MAX_SIDE or width * height > limit:
        raise ImageError(
            f"image: expected at most {limit} pixels and sides up to {_MAX_SIDE}, got {width} x {height}; scale it down"
        )


def _to_8_bits(image: Image.Image, from_png: bool) -> Image.Image:
    """Scale 16 bits a channel to 8. Pillow's own conversion clips them, and so turns such a picture white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and from_png):  # "I": 16-bit PNG in older versions of Pillow
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(
            f"image: expected 8 or 16 bits a channel, got 32 (Pillow mode {image.mode}); scale it to 0..255 as L"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    """As its orientation says; a picture whose EXIF cannot be read is taken as it lies, as viewers do.

    Pillow turns TIFFs by itself while it decodes them and takes the tag away, so the tag is read after that. Its
    ``exif_transpose`` also writes the EXIF anew, which fails where another tag is damaged.
    """
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF raises what struct, the TIFF reader or the XML parser make of it
        return image
    return image if turn is None else image.transpose(turn)


def _to_pixels(image: Image.Image, max_pixels: int | None) -> Pixels:
    _check_size(*image.size, max_pixels)
    image = _to_8_bits(_upright(image), image.format == "PNG")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8))


def _kinds() -> list[str]:
    """Kinds that are read: all that this Pillow knows, plugins that a program registered among them, but ours."""
    Image.init()
    return [kind for kind in Image.ID if kind not in REFUSED_KINDS]


def _shown(path: str | os.PathLike[str]) -> str:
    """A path in one line that can be printed, whatever its bytes."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def _check_bytes(count: int, name: str) -> None:
    if count > MAX_BYTES:
        raise ImageError(f"image: expected a file of at most {MAX_BYTES} bytes, got {count} ({name}); scale it down")


def _check_file(path: str | os.PathLike[str]) -> None:
    """A regular file within the limit; what cannot be looked at is left to Pillow's own errors."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # ValueError: a null character in the path
        return
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(
            f"image: expected a file, got a folder, pipe or device at {_shown(path)}; pass a picture's file"
        )
    _check_bytes(found.st_size, _shown(path))


def _decode(
    data: str | os.PathLike[str] | io.BytesIO, name: str, max_pixels: int | None, formats: list[str] | None = None
) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that Pillow works around; what it cannot is an exception
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(data, formats=formats or _kinds()) as image:
                return _to_pixels(image, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError as err:
        raise ImageError(f"image: expected a file, found none at {name}; check the path") from err
    except UnidentifiedImageError as err:
        raise ImageError(f"image: expected a picture that Pillow can read, got {name}; use PNG, JPEG or WebP") from err
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ImageError(f"image: too many pixels in {name} ({' '.join(str(err).split())}); scale it down") from err
    except Exception as err:  # each of Pillow's decoders has its own; whatever they raise is about the file
        raise ImageError(f"image: {name} cannot be decoded ({' '.join(str(err).split())}); is it damaged?") from err


def load_image(source: ImageSource, *, max_pixels: int | None = None, formats: list[str] | None = None) -> Pixels:
    """The picture as uint8 RGB, shape (height, width, 3), C order.

    Args:
        source: a path, the bytes of an image file, a Pillow image, or a uint8 array (height, width, 3).
        max_pixels: a limit below Pillow's own, checked before the picture is decoded.
        formats: Pillow's names of the file formats that are tried, among those that it has; None is all of them.

    Raises:
        ImageError: no such file, not a picture, damaged, too large, or an array of another shape or dtype.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.vision.images import load_image
        >>> load_image(qap.packaged_model().sample).shape
        (192, 192, 3)
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(
                f"image: expected a uint8 array (height, width, 3), got {source.dtype} {source.shape}; use RGB"
            )
        _check_size(source.shape[1], source.shape[0], max_pixels)
        return np.ascontiguousarray(source)
    if isinstance(source, Image.Image):
        try:
            return _to_pixels(source, max_pixels)
        except ImageError:
            raise
        except Exception as err:
            raise ImageError(f"image: the Pillow image cannot be decoded ({' '.join(str(err).split())})") from err
    if isinstance(source, bytes):
        _check_bytes(len(source), "bytes")
        return _decode(io.BytesIO(source), f"{len(source)} bytes", max_pixels, formats)
    if isinstance(source, (str, os.PathLike)):
        _check_file(source)
        return _decode(source, _shown(source), max_pixels, formats)
    raise ImageError(f"image: expected a path, bytes, a Pillow image or an array, got {type(source).__name__}")
