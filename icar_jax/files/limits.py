"""The bounds of every reader, in one place; docs/files.md lists them for users.

A bound is far above what good files need and far below what exhausts a machine. A reader that meets one refuses the file with the
bound, the value found and the fix. Names say the unit.
"""

from __future__ import annotations

# Images.
IMAGE_BYTES = 1 << 29  # of an image file; it is held in memory while it is hashed and decoded
IMAGE_PIXELS = 178_956_970  # where Pillow refuses an image by default; a photograph of 150 megapixels passes
DECODED_BYTES = 1_500_000_000  # most memory of decoding one image at full size, beyond the bytes of its file
REDUCED_BYTES = 800_000_000  # the same where a reduced size is asked for, as all programs but training do
LARGE_PIXELS = 1 << 25  # images of more pixels are decoded one at a time in each process
IMAGE_SCANS = 100  # of a JPEG; progressive files of cameras and encoders have about ten
METADATA_BYTES = 1 << 20  # of an EXIF or XMP block that is searched for the orientation

# Text and structured files.
JSON_BYTES = 1 << 28  # of a JSON file of captions; descriptions of models are smaller
JSON_DEPTH = 64  # nested objects and lists
LINE_BYTES = 1 << 24  # of one line of a list or a .jsonl file

# Archives and compressed members.
MEMBERS = 1_000_000  # of an archive
EXPANSION = 1_100  # decompressed bytes for each compressed byte; deflate reaches 1,032

# Filters of searches.
FILTER_CHARACTERS = 2_000
FILTER_DEPTH = 32  # nested parentheses
FILTER_SECONDS = 30.0  # of a filtered search
