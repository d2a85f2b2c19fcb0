"""The bounds of every reader, in one place; docs/files.md lists them for users.

A bound is far above what good files need and far below what exhausts a machine. A reader that meets one refuses the file with
the bound and the value found. Names say the unit.
"""

from __future__ import annotations

# Images.
IMAGE_BYTES = 1 << 29  # of an image file; it is held in memory while it is hashed and decoded
IMAGE_PIXELS = 178_956_970  # where Pillow refuses an image by default; a photograph of 150 megapixels passes
DECODED_BYTES = 1_500_000_000  # most memory of decoding one image, beyond the bytes of its file
REDUCED_FROM_PIXELS = 1 << 24  # images above may be reduced while they are converted, where few pixels are asked for
LARGE_BYTES = 1 << 28  # images that take more than this are decoded one at a time in each process
IMAGE_SCANS = 100  # of a JPEG; progressive files of cameras and encoders have about ten
IMAGE_PARTS = 100_000  # segments of a JPEG, chunks of a PNG, blocks of a GIF before its first frame
XMP_BYTES = 1 << 20  # of a block that is searched for the orientation

# Text and structured files.
JSON_BYTES = 1 << 28  # of a JSON file of captions; descriptions of models are smaller
JSON_DEPTH = 64  # nested objects and lists
SIZE = 1 << 26  # one size of a model: a width, a vocabulary, a number of positions
TOKENIZER_BYTES = 1 << 27  # of a tokenizer file, unpacked; published ones have up to 35 MB
EMBEDDING_BYTES = 1 << 35  # of an .npz of embeddings, unpacked; 125,000 rows of width 768 take 384 MB
LINE_BYTES = 1 << 24  # of one line of a list or a .jsonl file

# Archives and compressed members.
MEMBERS = 1_000_000  # of an archive
EXPANSION = 1_100  # decompressed bytes for each compressed byte; deflate reaches 1,032
UNPACKED_SHARE, UNPACKED_BYTES = 64, 1 << 28  # all compressed members of weights: so many times the file, or so many bytes
NAME_CHARACTERS = 1 << 26  # names of the tensors of a TorchScript file, all together

# Models: compared with the weights before any shape is built.
DEPTH = 1_000  # blocks of a tower, or of a stage

# Processes.
WORKERS, THREADS = 256, 256  # of one program

# Filters of searches.
FILTER_CHARACTERS = 2_000
FILTER_DEPTH = 32  # nested parentheses
FILTER_SECONDS = 30.0  # of a filtered search
