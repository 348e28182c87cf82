#!/usr/bin/env bash
# Pillow 13.0.0: a 16-bit RGB TIFF in separate planes opens as 8-bit RGB with the wrong pixels.
#
# Microscopes and satellites write colours as one plane after the other (PlanarConfiguration 2). Pillow
# reads the 16-bit samples of such an uncompressed file as 8-bit ones: low and high bytes alternate along
# a row, and the lower half of each plane is left out. There is no error or warning, and shape and mode
# are those of a sound image, so a classifier scores noise. The same planes compressed with zlib, and
# interleaved samples (PlanarConfiguration 1), give the high bytes.
# Guess before running it: the high bytes in all three, or an error. Seen: the first row holds bytes.
# Source: TIFF 6.0, PlanarConfiguration; Pillow's description of the TIFF format does not name the case.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 numpy==2.3.5
"$home/venv/bin/python" - <<'PY'
import io

import numpy as np
import PIL
import tifffile
from PIL import Image

planes = np.arange(3 * 4 * 6, dtype="<u2").reshape(3, 4, 6) * 900
print("Pillow", PIL.__version__, "tifffile", tifffile.__version__)
read = {}
for layout, samples, compression in (
    ("contig", planes.transpose(1, 2, 0), None),
    ("separate", planes, "zlib"),
    ("separate", planes, None),
):
    file, options = io.BytesIO(), {"compression": compression, "byteorder": "<"}
    tifffile.imwrite(file, samples, photometric="rgb", planarconfig=layout, **options)
    assert (tifffile.imread(io.BytesIO(file.getvalue())) == samples).all()
    image = Image.open(file)
    pixels = read[layout, compression] = np.asarray(image)
    print(layout, compression, image.mode, pixels.shape, "first row of red", pixels[0, :, 0].tolist())
print("high bytes of the file's first row of red", (planes[0, 0] >> 8).tolist())
for case in (("contig", None), ("separate", "zlib")):
    assert (read[case] == (planes >> 8).transpose(1, 2, 0)).all(), f"{case} has changed"
first_bytes = planes[0].view(np.uint8).reshape(-1)[: 4 * 6].reshape(4, 6)
assert (read["separate", None][..., 0] == first_bytes).all(), "separate planes have changed"
PY
