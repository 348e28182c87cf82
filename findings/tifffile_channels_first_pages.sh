#!/usr/bin/env bash
# tifffile 2026.3.3: imwrite of an array [13, H, W] makes 13 grey pages, not one image of 13 channels.
#
# Spectral bands are channels first in PyTorch and rasterio. Written as they are, with or without
# photometric="minisblack", each becomes a page of its own, and imread gives [13, H, W] back, so nothing
# looks wrong. A reader that takes the first page, as Pillow does on opening, sees band 1 as a grey
# image. planarconfig="separate" (and "contig" for [H, W, 13]) gives one page of 13 samples, which Pillow
# refuses instead.
# Guess before running it: one page of 13 samples with "minisblack". Seen: 13 pages of one.
# Source: tifffile's documentation of imwrite (photometric, planarconfig, and the order of axes).
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    tifffile==2026.3.3 pillow==13.0.0 numpy==2.3.5
"$home/venv/bin/python" - <<'PY'
import io

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

bands = np.random.default_rng(0).integers(0, 9000, (13, 8, 8), dtype=np.uint16)
print("tifffile", tifffile.__version__)
seen = []
grey = {"photometric": "minisblack"}
for keywords in ({}, grey, {**grey, "planarconfig": "separate"}):
    file = io.BytesIO()
    tifffile.imwrite(file, bands, **keywords)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as opened:
        assert (opened.asarray() == bands).all()
        pages, samples = len(opened.pages), opened.pages[0].samplesperpixel
    try:
        pillow = np.asarray(Image.open(file)).shape
    except UnidentifiedImageError:
        pillow = None
    seen.append((pages, samples, pillow))
    print(keywords, "pages %d, samples per pixel %d, shape in Pillow %s" % seen[-1])
assert seen == [(13, 1, (8, 8))] * 2 + [(1, 13, None)], "imwrite or Pillow has changed"
PY
