"""Data sets: open, inspect, convert, and load in an order that depends on the seed and the position alone."""

from imagewright.data.edm_zip import write_edm_zip
from imagewright.data.image_set import ImageSet
from imagewright.data.inspection import Info, convert, info
from imagewright.data.loader import Loader
from imagewright.data.opening import open_images
from imagewright.data.pixels import from_uint8, to_uint8

__all__ = [
    "ImageSet",
    "Info",
    "Loader",
    "convert",
    "from_uint8",
    "info",
    "open_images",
    "to_uint8",
    "write_edm_zip",
]
