#!/usr/bin/env bash
# Pillow 10.4.0: a 16-bit grey PNG opens in a mode that Image.resize refuses to interpolate.
#
# X-ray and microscope images are 16-bit grey PNGs. Pillow 9 opens them in mode I, in which resize works,
# Pillow 10 in mode I;16, in which bilinear and bicubic resizing is an error ("image has wrong mode"), and
# from Pillow 11 on it works. A preprocessing that resizes before it converts, as torchvision's Resize
# on a PIL image, runs on both sides of that one release, and not on it.
# Guess before running it: the same mode and values in all releases. Seen: modes I, I;16, I;16, and a
# ValueError in 10.4.0 only; the values that are read are equal.
# Source: Pillow's release notes 10.1 to 11.0 (mode I;16).
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
python="$home/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check numpy==1.26.4
seen=""
for version in 9.5.0 10.4.0 11.3.0; do
    "$python" -m pip install --quiet --disable-pip-version-check "pillow==$version"
    seen+=$("$python" - <<'PY'
import io

import numpy as np
import PIL
from PIL import Image

values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
file = io.BytesIO()
Image.fromarray(values).save(file, "PNG")
image = Image.open(file)
assert (np.asarray(image) == values).all()
try:
    result = "resized " + str(int(np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0]))
except ValueError as error:
    result = f"ValueError: {error}"
print(PIL.__version__, image.mode, result)
PY
)$'\n'
done
echo "$seen"
grep -q '^9.5.0 I resized 31500$' <<<"$seen"
grep -q '^10.4.0 I;16 ValueError' <<<"$seen"
grep -q '^11.3.0 I;16 resized 31500$' <<<"$seen"
