"""Label maps of GeoTIFFs that are read, predicted and written in parts.

rasterio reads and writes them; it is in the extra ``geo``. Only tiles and strips are ever held.
"""

from __future__ import annotations

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from mmvim.utils.launch import UserError

from .pictures import PictureError, to_rgb
from .record import Record, Track
from .whole import TILE, WholeSegmentor
from .windows import WindowedSegmentor

__all__ = ['RASTERS', 'Raster', 'predict_raster']

RASTERS = ('.tif', '.tiff')
BLOCK = 256  # sides of the tiles of the file that is written
# GDAL would keep decoded blocks in a twentieth of the machine's memory.
OPTIONS = dict(GDAL_CACHEMAX=256 * 2**20)


def require_rasterio() -> None:
    """Raise UserError where it is not installed."""
    if find_spec('rasterio') is None:
        raise UserError(
            "rasters need rasterio: pip install --no-build-isolation '.[geo]' installs it"
        )


class Raster:
    """A GeoTIFF as 8-bit RGB, of which parts are read.

    Args:
        dataset (rasterio.DatasetReader): Open.
        depth (int, optional): Bits that 16-bit samples really have.

    Raises:
        PictureError: It is none that is RGB or grey, or its samples need ``depth``.
    """

    def __init__(self, dataset, depth: int | None = None) -> None:
        self.dataset, self.depth = dataset, depth
        self.size = dataset.height, dataset.width
        kinds = [kind.name for kind in dataset.colorinterp]
        colours = [kinds.index(name) + 1 for name in ('red', 'green', 'blue') if name in kinds]
        if 'palette' in kinds:
            raise PictureError('it has a palette: convert it to RGB')
        if len(colours) == 3:
            self.bands = colours
        elif dataset.count - kinds.count('alpha') == 1 and kinds[0] in ('gray', 'undefined'):
            self.bands = [1]
        else:
            raise PictureError(
                f'its bands must be red, green and blue (others aside) or one of grey, got {kinds}'
            )
        if 'alpha' in kinds:
            self.bands = [*self.bands, kinds.index('alpha') + 1]
        types = {dataset.dtypes[band - 1] for band in self.bands}
        if types == {'uint16'} and depth is None:
            raise PictureError(
                'its samples have 16 bits, and a raster is not read twice to see how many are '
                'used: give the depth (--depth BITS)'
            )
        if types not in ({'uint8'}, {'uint16'}):
            raise PictureError(f'its samples must be uint8 or uint16, got {", ".join(types)}')
        # GDAL gives both of these as they are stored.
        bits = dataset.tags(self.bands[0], ns='IMAGE_STRUCTURE').get('NBITS', '8')
        if types == {'uint8'} and bits != '8':
            raise PictureError(f'its samples have {bits} bits: convert it to 8')
        if dataset.tags(ns='IMAGE_STRUCTURE').get('MINISWHITE') == 'YES':
            raise PictureError('0 is white in it: convert it to one in which 0 is black')

    @property
    def has_holes(self) -> bool:
        """Whether there may be pixels without data."""
        masks = [self.dataset.mask_flag_enums[band - 1] for band in self.bands]
        return any('all_valid' not in [flag.name for flag in flags] for flags in masks)

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Pixels (rows, columns, 3) of uint8, RGB, at indices that do not fall."""
        window = self._window(rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
        samples = self.dataset.read(self.bands, window=window)  # (bands, h, w)
        samples = samples[:, rows - rows[0]][:, :, columns - columns[0]]
        return self._to_rgb(samples)

    def _to_rgb(self, samples: np.ndarray) -> np.ndarray:
        if len(samples) == 2:  # grey and alpha
            samples = samples[[0, 0, 0, 1]]
        grey = len(samples) == 1
        return to_rgb(samples[0] if grey else samples.transpose(1, 2, 0), self.depth)

    def holes(self, row: int, column: int, shape: tuple[int, int]) -> np.ndarray:
        """Where there is no data, of a part: (h, w) of bool."""
        window = self._window(row, row + shape[0], column, column + shape[1])
        return self.dataset.dataset_mask(window=window) == 0

    def overview(self, size: tuple[int, int]) -> np.ndarray:
        """All of it in (h, w, 3) pixels."""
        return self._to_rgb(self.dataset.read(self.bands, out_shape=(len(self.bands), *size)))

    @staticmethod
    def _window(top: int, bottom: int, left: int, right: int):
        from rasterio.windows import Window

        return Window(int(left), int(top), int(right - left), int(bottom - top))


def predict_raster(
    model: nn.Module,
    source: str | Path,
    target: str | Path,
    depth: int | None = None,
    tile: int | None = None,
    track: Track = lambda items, what: items,
    *,
    windows: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Predict a GeoTIFF of any size at its own resolution: as a whole, or in windows.

    As a whole, all of it is in the backbone at once. In windows, the model sees one of them at a
    time, independent of the others, and their scores are blended where they overlap.

    ``Resize`` in the test pipeline is left out. What is predicted is what
    :func:`~mmvim.apis.predict` predicts for the same pixels, except for rounding; where a side is
    no multiple of twice the patch's (with UperNet), its border is repeated up to one. One window
    that holds all of the raster gives it to the bit, whatever the sides. Pixels without data
    (nodata, masks, alpha of 0) are seen as they are stored, and written as nodata.

    Args:
        model (nn.Module): From :func:`~mmvim.apis.load_model`: an ``EncoderDecoder`` of mmseg with
            a ``VisionMamba`` and a head of convolutions, ``UPerHead`` or ``PSPHead``. For
            ``windows`` any segmentor of mmseg.
        source (str | Path): A GeoTIFF or BigTIFF of uint8 or uint16, RGB or grey.
        target (str | Path): The GeoTIFF to write, with the source's CRS and transform, and a
            palette for up to 255 classes. In ``target`` with ``.parts`` behind its name are files
            of the unfinished work (4 bytes for each channel of each patch and map, or 8 for each
            class and pixel of one row of overlaps); a call that was stopped goes on with them.
        depth (int, optional): Bits that 16-bit samples really have; they need it.
        tile (int, optional): As a whole: side of what the **head** takes at once, in pixels, which
            changes memory and not labels. Default: 1024.
        track (Callable): Wraps sequences that take long, as ``rich.progress.track`` does.
        windows (int, optional): Side of windows, in pixels. Default: as a whole.
        overlap (int, optional): Pixels by which neighbours overlap at least. Default: a quarter of
            ``windows``.
        batch_size (int, optional): Windows in one pass. Default: 1.

    Returns:
        tuple[np.ndarray, np.ndarray]: An overview of at most 2048 pixels a side: the picture
        (h, w, 3) of uint8 and the labels (h, w), the number of classes where there is no data.

    Raises:
        PictureError: The file is no GeoTIFF, or its samples are none of these.
        UserError: The model cannot be taken apart like this, rasterio is missing, an argument is
            of the other way, or ``target`` is ``source``.
    """
    require_rasterio()
    import rasterio
    from rasterio.errors import RasterioError

    segmentor = _segmentor(model, tile, windows, overlap, batch_size)
    meta = cast(dict, model.dataset_meta)
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise PictureError('there is no such file')
    if target.exists() and target.samefile(source):
        raise UserError(f'target is the raster itself, which its labels would replace: {target}')
    parts = target.with_name(f'{target.name}.parts')
    with rasterio.Env(**OPTIONS):
        try:
            # Other drivers read what only points elsewhere, and run code.
            dataset = rasterio.open(source, driver='GTiff')
        except RasterioError as error:
            raise PictureError(f'broken, or no GeoTIFF ({error})') from None
        with dataset:
            raster = Raster(dataset, depth)
            labels = Labels(parts / 'labels', raster.size, len(meta['classes']))
            stat = source.stat()
            key = f'{source.resolve()} {stat.st_size} {stat.st_mtime_ns} {depth} {_weights(model)}'
            record = Record(parts / 'work.json')
            if record.read(key, windows, overlap) is None:
                # Labels of other work must not stay among those of this.
                shutil.rmtree(parts, ignore_errors=True)
                parts.mkdir(parents=True)
                record.write(key, windows, overlap, True)
            try:
                segmentor(raster.size, raster.read, labels.write, parts, track, key)
                labels.save(target, raster, meta['palette'], track)
            except RasterioError as error:
                raise PictureError(f'broken, or cannot be written ({error})') from None
            step = -(-max(raster.size) // 2048)
            small = labels.values[::step, ::step].astype(np.int64)
            if raster.has_holes:
                hole = dataset.dataset_mask(out_shape=small.shape) == 0
                small[hole] = len(meta['classes'])
            picture = raster.overview(small.shape)
    del labels  # the mapped file
    shutil.rmtree(parts)
    return picture, small


def _segmentor(model, tile, windows, overlap, batch_size) -> WholeSegmentor | WindowedSegmentor:
    """Arguments as of :func:`predict_raster`; those of the way that is not taken must be None."""
    if windows is not None:
        if tile is not None:
            raise UserError(
                'tile is what the head takes of a raster that the backbone sees as a whole, and '
                f'has no meaning with windows, got tile={tile} and windows={windows}'
            )
        batch_size = 1 if batch_size is None else batch_size
        return WindowedSegmentor(model, windows, overlap, batch_size)
    if overlap is not None or batch_size is not None:
        raise UserError(
            f'overlap and batch_size need windows, got overlap={overlap} and '
            f'batch_size={batch_size}'
        )
    return WholeSegmentor(model, TILE if tile is None else tile)


class Labels:
    """A label map in a file of plain numbers, until it is complete.

    Args:
        path (Path): The file.
        size (tuple[int, int]): Rows and columns.
        classes (int): Number of classes. One more number stands for no data.
    """

    def __init__(self, path: Path, size: tuple[int, int], classes: int) -> None:
        self.path, self.size = path, size
        self.dtype = np.dtype(np.uint8 if classes < 256 else np.uint16)
        self.nodata = 255 if classes < 256 else 65535

    @property
    def values(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, 'r', shape=self.size)

    def write(self, row: int, column: int, labels: np.ndarray) -> None:
        labels = labels.astype(self.dtype)
        self.path.touch()
        with open(self.path, 'r+b') as file:
            for k, line in enumerate(labels):
                file.seek(((row + k) * self.size[1] + column) * self.dtype.itemsize)
                file.write(line)

    def save(self, target: Path, raster: Raster, palette, track: Track) -> None:
        """Write the GeoTIFF, at first under another name."""
        import rasterio
        from rasterio.windows import Window

        height, width = self.size
        profile = dict(
            driver='GTiff',
            height=height,
            width=width,
            count=1,
            dtype=self.dtype.name,
            crs=raster.dataset.crs,
            transform=raster.dataset.transform,
            nodata=self.nodata if raster.has_holes else None,
            compress='deflate',
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            bigtiff='if_safer',
        )
        new = target.with_name(f'{target.name}.parts') / 'new.tif'
        with rasterio.open(new, 'w', **profile) as out:
            if self.dtype == np.uint8:
                out.write_colormap(1, {k: (*colour, 255) for k, colour in enumerate(palette)})
            for top in track(range(0, height, BLOCK), 'writing'):
                rows = min(BLOCK, height - top)
                lines = np.fromfile(
                    self.path, self.dtype, rows * width, offset=top * width * self.dtype.itemsize
                ).reshape(rows, width)
                if raster.has_holes:
                    lines[raster.holes(top, 0, lines.shape)] = self.nodata
                out.write(lines, 1, window=Window(0, top, width, rows))
        new.replace(target)


def _weights(model: nn.Module) -> str:
    """A short text that differs from that of other weights and settings."""
    cfg = cast(Config, model.cfg)
    digest = hashlib.sha256(f'{model} {cfg.model}'.encode())
    # Some buffers are not in the state dict, as the mean that is taken from pixels.
    for value in (*model.parameters(), *model.buffers()):
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
