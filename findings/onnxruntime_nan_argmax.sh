#!/usr/bin/env bash
# onnxruntime 1.23.2 (CPU): ArgMax and ReduceMax see a NaN or not, depending on where it stands.
#
# torch.argmax and torch.amax propagate NaN wherever it is. After export to ONNX the maximum of the same
# logits may be finite, and the class that of another logit: a check for NaN of the largest logit (MLS,
# MSP) misses what it found in PyTorch. ReduceLogSumExp (energy) does give NaN.
# Guess before running it: as in PyTorch, NaN and its index. Seen: ReduceMax of (1, 2, NaN) is 2 and
# ArgMax is 1; of (NaN, 1, 2) they are NaN and 0; of (1, NaN, 2) they are 2 and 2.
# Source: the ONNX operator documentation, which leaves NaN open for both.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    onnxruntime==1.23.2 onnx==1.19.1 numpy==2.3.5
"$home/venv/bin/python" - <<'PY'
import math

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

outputs = {"class": ("ArgMax", TensorProto.INT64), "largest": ("ReduceMax", TensorProto.FLOAT)}
outputs["energy"] = ("ReduceLogSumExp", TensorProto.FLOAT)
nodes, values = [], []
for name, (operator, kind) in outputs.items():
    axes = {"axis": 1} if operator == "ArgMax" else {"axes": [1]}
    nodes.append(helper.make_node(operator, ["logits"], [name], keepdims=0, **axes))
    values.append(helper.make_tensor_value_info(name, kind, [None]))
logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, 3])
graph = helper.make_graph(nodes, "heads", [logits], values)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString())
print("onnxruntime", onnxruntime.__version__)
nan = math.nan
rows = np.array([[nan, 1, 2], [1, nan, 2], [1, 2, nan]], np.float32)
classes, largest, energy = session.run(None, {"logits": rows})
for row, *found in zip(rows.tolist(), classes, largest, energy):
    print("logits", row, "ArgMax %d, ReduceMax %s, ReduceLogSumExp %s" % tuple(found))
assert classes.tolist() == [0, 2, 1], "ArgMax has changed"
assert np.isnan(largest).tolist() == [True, False, False], "ReduceMax has changed"
assert np.isnan(energy).all(), "ReduceLogSumExp has changed"
PY
