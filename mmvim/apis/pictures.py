"""Reading pictures as people see them: upright, on white, eight bits, red before blue.

The usual loaders take a picture's numbers as they are stored. A transparent pixel then shows the
colour that it hides, 12-bit data in a 16-bit file is nearly black, and a picture cut short ends in
grey. For ordinary 8-bit pictures this reader gives the same numbers as mmcv's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ['Picture', 'PictureError', 'is_picture', 'load_picture', 'read_picture', 'to_rgb']

# Kinds that are pictures and nothing else. Pillow reads more: EPS runs Ghostscript, raw photos look
# like TIFF and give their thumbnail, some kinds have no signature and are found in any file.
SUFFIXES = {
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif'),
    'MPO': ('.mpo',),
    'PNG': ('.png', '.apng'),
    'TIFF': ('.tif', '.tiff'),
    'WEBP': ('.webp',),
    'AVIF': ('.avif',),
    'BMP': ('.bmp', '.dib'),
    'DIB': (),
    'GIF': ('.gif',),
    'PPM': ('.ppm', '.pgm', '.pbm', '.pnm'),
    'JPEG2000': ('.jp2', '.j2k', '.jpx'),
}
# What a sensor's converter gives; data is taken as the least of these that holds it.
DEPTHS = (8, 10, 12, 14, 16)
# Tags of TIFF and EXIF
PHOTOMETRIC, ORIENTATION, EXTRA_SAMPLES = 262, 274, 338


class PictureError(ValueError):
    """A file or an array that is no picture; the message says why, without its name."""


class Picture(NamedTuple):
    """A picture and what a user should know of how it was read."""

    pixels: np.ndarray  # (H, W, 3) uint8, RGB
    notes: tuple[str, ...] = ()


def read_picture(path: str | Path, depth: int | None = None) -> np.ndarray:
    """Read a picture as a person would see it.

    It is turned as its EXIF orientation says, blended on white where it is transparent, and
    converted to RGB from grey, palette or CMYK (without the embedded colour profile). Of several
    frames or pages the first is read. 16-bit samples are scaled to 8 bits from the least of 8, 10,
    12, 14 and 16 bits that holds all of them.

    Args:
        path (str | Path): A JPEG, PNG, TIFF, WebP, AVIF, BMP, GIF, PPM or JPEG 2000 file.
        depth (int, optional): The bits that 16-bit samples really have, 8 to 16. Pictures of a
            series should have it set: a dark one among them may have fewer bits in use.

    Returns:
        np.ndarray: (H, W, 3) of uint8, RGB.

    Raises:
        PictureError: The file is missing, broken, no picture, or one whose range is not known
            (32-bit integers, floating point).
    """
    return load_picture(path, depth).pixels


def is_picture(path: Path) -> bool:
    """Whether the name's suffix is that of a kind which :func:`read_picture` reads."""
    suffix = path.suffix.lower()
    return any(suffix in suffixes for suffixes in SUFFIXES.values())


def load_picture(path: str | Path, depth: int | None = None) -> Picture:
    """As :func:`read_picture`, with notes."""
    Image.init()
    formats = [name for name in SUFFIXES if name in Image.OPEN]  # AVIF may be missing
    try:
        # A file object: given a name, Pillow maps an uncompressed TIFF into memory, and then
        # reads one that is to be turned by 90 degrees with width and height exchanged.
        with open(path, 'rb') as file, Image.open(file, formats=formats) as image:
            return _decode(image, Path(path), depth)
    except FileNotFoundError:
        raise PictureError('there is no such file') from None
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(
            'larger than 358 megapixels; --raster predicts a GeoTIFF of any size'
        ) from None
    except UnidentifiedImageError:
        raise PictureError('broken, or no picture') from None
    # Decoders of broken files raise almost anything: OSError, SyntaxError, struct.error, ….
    except Exception as error:
        raise PictureError(f'broken, or no picture ({error or type(error).__name__})') from None


def _decode(image: Image.Image, path: Path, depth: int | None) -> Picture:
    notes = []
    # An MPO is a photo that comes with more of the same scene.
    if getattr(image, 'n_frames', 1) > 1 and image.format != 'MPO':
        notes.append('only the first of several pages or frames was read')
    if _is_deep(image):
        samples = _deep_samples(image, path)
        if 'transparency' in image.info:
            samples = _with_alpha(samples, image.info['transparency'])
        depth = depth or _bits(samples)
        notes.append(f'16-bit samples were read as {depth}-bit')
        return Picture(to_rgb(samples, depth), tuple(notes))
    if image.mode in ('I', 'F'):
        raise PictureError(
            f'its samples are 32-bit ({image.mode}) and their range is not known; '
            'scale them to 8 or 16 bits'
        )
    _scale_transparent_grey(image)
    return Picture(_on_white(ImageOps.exif_transpose(image)), tuple(notes))


def _on_white(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return np.array(image.convert('RGB'))


def _scale_transparent_grey(image: Image.Image) -> None:
    """Bring a PNG's transparent grey of 2 or 4 bits to 8, as Pillow does with the samples only."""
    hidden = image.info.get('transparency')
    if image.format == 'PNG' and isinstance(hidden, int):
        largest = {'L;2': 3, 'L;4': 15}.get(_decoder_args(image)[0], 255)
        if hidden <= largest:
            image.info['transparency'] = hidden * 255 // largest


def _decoder_args(image: Image.Image) -> tuple:
    """What Pillow's decoder is given; for most formats the samples' kind comes first."""
    tiles = getattr(image, 'tile', None)
    args = tiles[0].args if tiles else ''
    return args if isinstance(args, tuple) else (args,)


def _is_deep(image: Image.Image) -> bool:
    """Whether samples have 16 bits, of which Pillow keeps 8 where it has no mode for them."""
    if image.mode.startswith('I;16'):
        return True
    args = _decoder_args(image)
    if image.format == 'PPM':  # its arguments end with the largest sample
        return image.mode == 'I' or (isinstance(args[-1], int) and args[-1] > 255)
    return image.format in ('PNG', 'TIFF') and ';16' in str(args[0]) and image.mode != 'I'


def _deep_samples(image: Image.Image, path: Path) -> np.ndarray:
    """(H, W), (H, W, 3) RGB or (H, W, 4) RGBA of uint16, upright."""
    if image.format == 'JPEG2000':
        raise PictureError('grey JPEG 2000 of more than 8 bits: convert it to TIFF or PNG')
    tags = getattr(image, 'tag_v2', {})
    if image.mode.startswith('I;16'):
        samples = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
        return 65535 - samples if tags.get(PHOTOMETRIC) == 0 else samples
    if image.mode == 'CMYK' or 1 in tags.get(EXTRA_SAMPLES, ()):
        raise PictureError(
            '16-bit CMYK, or 16-bit colours multiplied with alpha: convert it to RGB'
        )
    samples = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16:
        raise PictureError(f'16-bit samples of a kind of {image.format} that cannot be read')
    if samples.ndim == 3:
        samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]
        if image.mode == 'RGB':  # a fourth channel is no alpha, but infrared, say
            samples = samples[..., :3]
    return samples if image.format == 'TIFF' else _upright(samples, image.getexif())


def _with_alpha(samples: np.ndarray, hidden: int | tuple[int, ...]) -> np.ndarray:
    """(H, W, 4) RGBA of grey or RGB samples of which one colour is transparent, as PNG has it."""
    colours = samples if samples.ndim == 3 else np.dstack([samples] * 3)
    alpha = np.where((colours == hidden).all(-1), 0, 65535).astype(np.uint16)
    return np.dstack([colours, alpha])


def _upright(samples: np.ndarray, exif: Image.Exif) -> np.ndarray:
    """Turn an array as EXIF says; OpenCV does so for TIFF only."""
    orientation = exif.get(ORIENTATION, 1)
    if orientation >= 5:
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples


def _bits(samples: np.ndarray) -> int:
    """The least usual depth that holds all samples that are seen, those of alpha aside."""
    used = int(_colours(samples).max()).bit_length()
    return next(depth for depth in DEPTHS if depth >= used)


def _colours(samples: np.ndarray) -> np.ndarray:
    """Samples without alpha, and 0 where it hides all of them: they may be anything there."""
    if samples.ndim == 3 and samples.shape[2] == 4:
        return samples[..., :3] * (samples[..., 3:] > 0)
    return samples


def to_rgb(array: np.ndarray, depth: int | None = None) -> np.ndarray:
    """Convert an array of samples to 8-bit RGB.

    Args:
        array (np.ndarray): (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8 or uint16.
        depth (int, optional): The bits that uint16 samples really have; default: the least of 8,
            10, 12, 14 and 16 that holds them.

    Returns:
        np.ndarray: (H, W, 3) of uint8.

    Raises:
        PictureError: The array has another shape or type, or its samples more bits than ``depth``.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise PictureError(f'an array must be (H, W), (H, W, 3) or (H, W, 4), got {array.shape}')
    if array.dtype not in (np.uint8, np.uint16) or not array.size:
        raise PictureError(
            f'an array must hold samples of uint8 or uint16, got {array.shape} of {array.dtype}'
        )
    if array.dtype == np.uint16:
        array = _to_8_bits(array, depth or _bits(array))
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _on_white(Image.fromarray(np.ascontiguousarray(array)))


def _to_8_bits(samples: np.ndarray, depth: int) -> np.ndarray:
    if samples.ndim == 3 and samples.shape[2] == 4:
        # Alpha may use all 16 bits beside colours that do not.
        alpha = samples[..., 3]
        alpha = _to_8_bits(alpha, depth if alpha.max() < 2**depth else 16)
        return np.dstack([_to_8_bits(_colours(samples), depth), alpha])
    if samples.max() >= 2**depth:
        raise PictureError(f'a sample is {samples.max()}, more than {depth} bits hold')
    # A table needs no temporary of floats.
    table = np.round(np.arange(2**depth) * (255 / (2**depth - 1))).astype(np.uint8)
    return table[samples]
