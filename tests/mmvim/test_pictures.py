"""Reading pictures of every kind: what comes out is what a person would see."""

import struct
import zlib

import cv2
import mmcv
import numpy as np
import pytest
from PIL import Image

from mmvim.apis import PictureError, read_picture
from mmvim.apis.pictures import load_picture, to_rgb

ORIENTATION = 0x0112


def scene(height: int = 30, width: int = 44) -> np.ndarray:
    """A smooth picture whose sides and channels all differ."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = 60 + 4 * x, 20 + 6 * y, 200 - 3 * x - y
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.webp', 'a.bmp', 'a.tif', 'a.ppm'])
def test_ordinary_files_are_read_as_mmcv_reads_them(tmp_path, name):
    Image.fromarray(scene()).save(tmp_path / name)
    read = read_picture(tmp_path / name)
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, mmcv.imread(str(tmp_path / name))[..., ::-1])


def test_a_lossless_file_is_read_as_red_green_blue(tmp_path):
    Image.fromarray(scene()).save(tmp_path / 'a.png')
    np.testing.assert_array_equal(read_picture(tmp_path / 'a.png'), scene())


def test_grey_and_palette_files_become_rgb(tmp_path):
    grey = scene()[..., 0]
    Image.fromarray(grey).save(tmp_path / 'grey.png')
    np.testing.assert_array_equal(read_picture(tmp_path / 'grey.png'), np.dstack([grey] * 3))
    palette = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    palette.putpalette([value for k in range(6) for value in (40 * k, 255 - 40 * k, 7)])
    palette.save(tmp_path / 'palette.gif')
    read = read_picture(tmp_path / 'palette.gif')
    assert read[1, 0].tolist() == [120, 135, 7] and read[0, 2].tolist() == [80, 175, 7]
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / 'bits.png')
    assert set(np.unique(read_picture(tmp_path / 'bits.png'))) == {0, 255}


def upright(picture: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of a picture stored with an orientation, by EXIF's table."""
    turns = {
        1: lambda p: p,
        2: np.fliplr,
        3: lambda p: np.rot90(p, 2),
        4: np.flipud,
        5: lambda p: np.fliplr(np.rot90(p, -1)),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.flipud(np.rot90(p, -1)),
        8: np.rot90,
    }
    return turns[orientation](picture)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.webp', 'a.tif'])
def test_files_are_turned_as_exif_says(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {'lossless': True} if name == 'a.webp' else {}
    Image.fromarray(scene()).save(tmp_path / name, exif=exif, **lossless)
    read = read_picture(tmp_path / name)
    assert read.shape == upright(scene(), orientation).shape
    close = 12 if name == 'a.jpg' else 0
    np.testing.assert_allclose(read, upright(scene(), orientation), rtol=0, atol=close)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGBA', 'CMYK'])
@pytest.mark.parametrize('orientation', [3, 5, 6, 7, 8])
def test_an_uncompressed_tiff_of_any_mode_is_turned(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(scene()).convert(mode)
    image.save(tmp_path / 'a.tif', exif=exif)
    expected = upright(np.array(image.convert('RGB')), orientation)
    np.testing.assert_array_equal(read_picture(tmp_path / 'a.tif'), expected)


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_files_of_16_bits_are_turned_too(tmp_path, name, channels, orientation):
    picture = scene()[..., 0] if channels == 1 else scene()
    deep = picture.astype(np.uint16) * 257
    path = tmp_path / name
    if name == 'a.tif':
        write_tiff(path, deep, orientation=orientation)
    else:
        write_deep(path, deep)
        write_png_orientation(path, orientation)
    expected = upright(np.dstack([picture] * 3) if channels == 1 else picture, orientation)
    np.testing.assert_array_equal(read_picture(path), expected)


def write_deep(path, samples: np.ndarray) -> None:
    order = [2, 1, 0, 3][: samples.shape[2]] if samples.ndim == 3 else slice(None)
    assert cv2.imwrite(str(path), np.ascontiguousarray(samples[..., order]))


def write_png_orientation(path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    insert_chunk(path, b'eXIf' + exif.tobytes().removeprefix(b'Exif\0\0'))


def write_transparent(path, *colour: int) -> None:
    """Let a PNG say which of its colours is transparent."""
    insert_chunk(path, b'tRNS' + struct.pack(f'>{len(colour)}H', *colour))


def insert_chunk(path, body: bytes) -> None:
    content = path.read_bytes()
    header = 33  # the signature and the first chunk
    path.write_bytes(content[:header] + chunk(body) + content[header:])


def chunk(body: bytes) -> bytes:
    return struct.pack('>I', len(body) - 4) + body + struct.pack('>I', zlib.crc32(body))


def write_tiff(path, samples: np.ndarray, **tags: int) -> None:
    """An uncompressed TIFF of uint16 with the tags that a test is about."""
    height, width, channels = np.atleast_3d(samples).shape
    entries = {256: width, 257: height, 258: 16, 259: 1, 262: 1 if channels == 1 else 2}
    entries |= {273: 8, 277: channels, 278: height, 279: samples.nbytes}
    names = dict(orientation=ORIENTATION, photometric=262, extra_samples=338)
    entries |= {names[name]: value for name, value in tags.items()}
    table = struct.pack('<H', len(entries))
    after = 8 + samples.nbytes + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        if tag == 258 and channels > 2:  # does not fit into the entry
            table += struct.pack('<HHII', tag, 3, channels, after)
        elif tag == 258:
            table += struct.pack('<HHIHH', tag, 3, channels, 16, 16 * (channels == 2))
        else:
            table += struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, value)
    start = struct.pack('<2sHI', b'II', 42, 8 + samples.nbytes)
    bits = struct.pack(f'<{channels}H', *[16] * channels)
    path.write_bytes(start + samples.astype('<u2').tobytes() + table + bytes(4) + bits)


def test_transparent_pixels_show_white_not_the_colour_they_hide(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[0, :, 3] = 0, 51, 255
    expected = [[[255, 255, 255], [244, 204, 204], [200, 0, 0]]]
    for name in ('a.png', 'a.tif'):
        Image.fromarray(pixels).save(tmp_path / name)
        np.testing.assert_array_equal(read_picture(tmp_path / name), expected)
    write_deep(tmp_path / 'deep.png', pixels.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_picture(tmp_path / 'deep.png'), expected)


def test_the_transparent_colour_of_a_palette_or_of_grey_shows_white(tmp_path):
    grey = Image.fromarray(np.array([[0, 90]], np.uint8))
    grey.save(tmp_path / 'grey.png', transparency=0)
    assert read_picture(tmp_path / 'grey.png').tolist() == [[[255] * 3, [90] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / 'palette.png', transparency=0)
    assert read_picture(tmp_path / 'palette.png').tolist() == [[[255] * 3, [40, 50, 60]]]


def test_the_transparent_colour_of_16_bits_shows_white_and_says_nothing_of_the_depth(tmp_path):
    path = tmp_path / 'deep.png'
    samples = np.array([[819, 65535], [4095, 0]], np.uint16)
    write_deep(path, samples)
    write_transparent(path, 65535)
    write_png_orientation(path, 6)
    read = load_picture(path)
    assert read.pixels[..., 0].tolist() == [[255, 51], [0, 255]]
    assert read.notes == ('16-bit samples were read as 12-bit',)

    colours = np.dstack([samples, samples, np.full_like(samples, 65535)])
    colours[0, 0, 2] = colours[1, :, 2] = 0
    write_deep(path, colours)
    write_transparent(path, 65535, 65535, 65535)
    for depth in (None, 12):
        read = read_picture(path, depth)
        assert read.tolist() == [[[51, 51, 0], [255] * 3], [[255, 255, 0], [0] * 3]]


def test_what_alpha_hides_says_nothing_of_the_depth():
    samples = np.array([[[819, 0, 4095, 65535], [65535, 65535, 65535, 0]]], np.uint16)
    assert to_rgb(samples).tolist() == to_rgb(samples, 12).tolist() == [[[51, 0, 255], [255] * 3]]
    assert to_rgb(samples[:, 1:]).tolist() == [[[255] * 3]]


@pytest.mark.parametrize('bits, row', [(1, 0b00011011), (2, 0b00011011), (4, 0x5A)])
def test_the_transparent_grey_of_few_bits_shows_white(tmp_path, bits, row):
    width, path = 8 // bits, tmp_path / 'few.png'
    values = [row >> (8 - bits * (k + 1)) & (2**bits - 1) for k in range(width)]
    for hidden in values:
        header = b'IHDR' + struct.pack('>IIBBBBB', width, 1, bits, 0, 0, 0, 0)
        content = [header, b'IDAT' + zlib.compress(bytes([0, row])), b'IEND']
        path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(map(chunk, content)))
        write_transparent(path, hidden)
        expected = [255 if v == hidden else v * 255 // (2**bits - 1) for v in values]
        assert read_picture(path)[0, :, 0].tolist() == expected


def test_cmyk_becomes_rgb(tmp_path):
    white, cyan, black = (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)
    pixels = np.repeat(np.array([[white, cyan, black]], np.uint8), 16, axis=0)
    image = Image.frombytes('CMYK', (48, 16), np.repeat(pixels, 16, axis=1).tobytes())
    for name in ('a.jpg', 'a.tif'):
        image.save(tmp_path / name, **({'quality': 100} if name == 'a.jpg' else {}))
        read = read_picture(tmp_path / name)[8, [8, 24, 40]]
        np.testing.assert_allclose(read, [[255, 255, 255], [0, 255, 255], [0, 0, 0]], atol=6)


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm', 'a.ppm'])
@pytest.mark.parametrize('bits', [10, 12, 14, 16])
def test_samples_of_16_bits_are_scaled_by_the_range_they_use(tmp_path, name, bits):
    samples = np.array([[0, (2**bits - 1) // 5, 2**bits - 1]], np.uint16)
    write_deep(tmp_path / name, np.dstack([samples] * 3) if name == 'a.ppm' else samples)
    read = load_picture(tmp_path / name)
    assert read.pixels[0, :, 0].tolist() == [0, 51, 255]
    assert read.notes == (f'16-bit samples were read as {bits}-bit',)


def test_a_dark_picture_of_a_series_needs_its_depth(tmp_path):
    write_deep(tmp_path / 'dark.png', np.full((2, 2), 819, np.uint16))
    assert read_picture(tmp_path / 'dark.png')[0, 0, 0] == 204  # taken for 10 bits
    assert read_picture(tmp_path / 'dark.png', depth=12)[0, 0, 0] == 51
    assert read_picture(tmp_path / 'dark.png', depth=16)[0, 0, 0] == 3
    with pytest.raises(PictureError, match='a sample is 819, more than 9 bits hold'):
        read_picture(tmp_path / 'dark.png', depth=9)


def test_opaque_alpha_does_not_count_for_the_depth():
    samples = np.array([[[4095, 819, 0, 65535]]], np.uint16)
    assert to_rgb(samples).tolist() == [[[255, 51, 0]]]


def test_the_fourth_channel_of_a_tiff_is_alpha_where_the_file_says_so(tmp_path):
    pixels = np.full((4, 4, 4), 102 * 257, np.uint16)
    pixels[..., 3] = 51 * 257
    write_tiff(tmp_path / 'alpha.tif', pixels, extra_samples=2)
    assert read_picture(tmp_path / 'alpha.tif')[0, 0].tolist() == [224, 224, 224]
    write_tiff(tmp_path / 'infrared.tif', pixels, extra_samples=0)
    assert read_picture(tmp_path / 'infrared.tif')[0, 0].tolist() == [102, 102, 102]
    write_tiff(tmp_path / 'multiplied.tif', pixels, extra_samples=1)
    with pytest.raises(PictureError, match='multiplied with alpha'):
        read_picture(tmp_path / 'multiplied.tif')


def test_a_tiff_may_store_white_as_zero(tmp_path):
    write_tiff(tmp_path / 'a.tif', np.array([[0, 13107, 65535]], np.uint16), photometric=0)
    assert read_picture(tmp_path / 'a.tif')[0, :, 0].tolist() == [255, 204, 0]


def test_of_several_frames_the_first_is_read(tmp_path):
    frames = [Image.fromarray(scene()), Image.fromarray(255 - scene())]
    frames[0].save(tmp_path / 'a.tif', save_all=True, append_images=frames[1:])
    read = load_picture(tmp_path / 'a.tif')
    np.testing.assert_array_equal(read.pixels, scene())
    assert read.notes == ('only the first of several pages or frames was read',)


def test_what_cannot_be_read_rightly_is_refused(tmp_path):
    with pytest.raises(PictureError, match='there is no such file'):
        read_picture(tmp_path / 'none.png')
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ('a.jpg', 'a.png', 'a.tif', 'a.webp'):
        path = tmp_path / name
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(PictureError, match='broken, or no picture'):
            read_picture(path)
    (tmp_path / 'text.jpg').write_text('not a picture')
    with pytest.raises(PictureError, match='broken, or no picture'):
        read_picture(tmp_path / 'text.jpg')
    (tmp_path / 'a.eps').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    with pytest.raises(PictureError, match='broken, or no picture'):
        read_picture(tmp_path / 'a.eps')
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / 'wide.tif')
        with pytest.raises(PictureError, match='32-bit'):
            read_picture(tmp_path / 'wide.tif')


@pytest.mark.parametrize(
    'array', [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8), np.uint8)]
)
def test_arrays_of_other_kinds_are_refused(array):
    with pytest.raises(PictureError, match='an array must'):
        to_rgb(array)
