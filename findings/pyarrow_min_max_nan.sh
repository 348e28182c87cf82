#!/usr/bin/env bash
# pyarrow 22.0.0: min_max, and so the statistics of a Parquet column, pass over NaN; mean does not.
#
# Scores in Parquet are often checked by their range. pyarrow.compute.min_max and the statistics that a
# file carries give the range of the other values, so a column of confidences with NaN looks sound, while
# NumPy's min and max and pyarrow's own mean are NaN. NaN is not null: null_count is 0, and `skip_nulls`
# has no say in it.
# Guess before running it: NaN, as in NumPy. Seen: min 1, max 3, and the same in the file's statistics.
# Source: Arrow's documentation of compute functions (min_max) and of Parquet column statistics.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==22.0.0 numpy==2.3.5
cd "$home"
venv/bin/python - <<'PY'
import math

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

scores = pa.table({"confidence": pa.array([1.0, math.nan, 3.0])})
parquet.write_table(scores, "scores.parquet")
found = pc.min_max(scores["confidence"], skip_nulls=False).as_py()
statistics = parquet.ParquetFile("scores.parquet").metadata.row_group(0).column(0).statistics
print("pyarrow", pa.__version__)
print("min_max", found, "mean", pc.mean(scores["confidence"]).as_py())
print("statistics of the file", statistics.min, statistics.max, "nulls", statistics.null_count)
assert found == {"min": 1.0, "max": 3.0}, "min_max has changed"
assert (statistics.min, statistics.max, statistics.null_count) == (1.0, 3.0, 0), "Parquet has changed"
assert math.isnan(pc.mean(scores["confidence"]).as_py()), "mean has changed"
PY
