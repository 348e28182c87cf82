#!/usr/bin/env bash
# Pillow 13.0.0: where height shrinks more than width, pixels differ by a grey level from 12.2.0.
#
# An image is resized along one side, rounded to 8 bits, and resized along the other. Up to 12.2.0 the
# width came first. 13.0.0 begins with the height for some sizes: a service with another Pillow than the
# training gives its network other pixels, and a port to another language has to know the order.
# Guess before running it: the same pixels in both, the width first. Seen: as guessed for 400 x 600, but
# for 600 x 400 thousands of pixels differ.
# Source: Pillow's tests of resampling, which compare pixels with stored values of squares only.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
python="$home/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check numpy==2.3.5
seen=""
for version in 12.2.0 13.0.0; do
    "$python" -m pip install --quiet --disable-pip-version-check "pillow==$version"
    seen+=$("$python" - <<'PY'
import numpy as np
import PIL
from PIL import Image


def resized(image, *size):
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(int)


for height, width in ((400, 600), (600, 400)):
    drawn = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    image, goal = Image.fromarray(drawn), (300, 224)
    found = resized(image, *goal)
    width_first = Image.fromarray(resized(image, 300, height).astype(np.uint8))
    difference = abs(found - resized(width_first, *goal))
    what = "width first" if not difference.any() else f"{difference.max()} grey level at most"
    print(PIL.__version__, f"{height} x {width}", what, (difference > 0).sum())
PY
)$'\n'
done
echo "$seen"
grep -q '^12.2.0 600 x 400 width first 0$' <<<"$seen"
grep -q '^13.0.0 400 x 600 width first 0$' <<<"$seen"
grep -qE '^13.0.0 600 x 400 1 grey level at most [0-9]{4}' <<<"$seen"
