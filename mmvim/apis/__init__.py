from .pictures import PictureError, read_picture
