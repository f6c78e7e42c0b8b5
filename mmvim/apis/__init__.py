"""Predicting in Python, for segmentation, detection and classification alike.

>>> from mmvim.apis import load_model, predict, read_picture
>>> model = load_model('configs/vim/….py', 'work_dirs/…/iter_160000.pth')
>>> picture = read_picture('photo.jpg')       # (H, W, 3), RGB
>>> sample, = predict(model, picture)         # SegDataSample, DetDataSample or DataSample

``tools/predict.py`` is the same for folders, with files as results; see docs/predict.md.
"""

from .models import load_model
from .pictures import PictureError, read_picture
from .prediction import predict
from .rasters import predict_raster

__all__ = ['PictureError', 'load_model', 'predict', 'predict_raster', 'read_picture']
