"""Image formats that are read, by Pillow's names and by suffix: raster formats only, one list for programs and server."""

from __future__ import annotations

import importlib.util

# Pillow opens other formats too; some of them start a program (EPS) or draw vectors (WMF).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF", "TIFF")
_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
_HEIF = {".heic", ".heif", ".hif"}
HEIF_READER = "pillow_heif"  # an optional package
READS_HEIF = importlib.util.find_spec(HEIF_READER) is not None

IMAGE_SUFFIXES = frozenset(_SUFFIXES | (_HEIF if READS_HEIF else set()))
# Photographs of cameras and phones that are not read; walks of folders count them.
UNREAD_SUFFIXES = (
    frozenset(
        {".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef"}
        | {".srw", ".raw", ".3fr", ".iiq", ".ppm", ".pgm", ".pnm", ".tga", ".ico"}
        | _HEIF
    )
    - IMAGE_SUFFIXES
)
