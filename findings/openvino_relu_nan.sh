#!/usr/bin/env bash
# openvino 2026.4.1 (CPU): Relu makes 0 of NaN, so an image with a NaN pixel has finite logits.
#
# torch.relu and ONNX Runtime's Relu pass NaN on. A service that looks for NaN in the outputs to notice
# broken inputs or overflows finds them in PyTorch, and no longer after conversion.
# Guess before running it: 0 in OpenVINO, NaN in ONNX Runtime. Seen: so.
# Source: OpenVINO's specification of ReLU-1, max(0, x), which leaves NaN open; IEEE 754's maximum and
# maxNum differ on it.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    openvino==2026.4.1 onnx==1.19.1 onnxruntime==1.23.2 numpy==2.3.5
"$home/venv/bin/python" - <<'PY'
import math
from io import BytesIO

import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper

nodes = [helper.make_node("Relu", ["x"], ["y"])]
of = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
graph = helper.make_graph(nodes, "relu", of[:1], of[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
data = model.SerializeToString()
x = np.array([[-1, math.nan, 2, math.nan]], np.float32)
session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
compiled = openvino.Core().compile_model(openvino.Core().read_model(BytesIO(data)), "CPU")
print("openvino", openvino.__version__)
by = {"onnxruntime": session.run(None, {"x": x})[0], "openvino": compiled(x)[0]}
for name, y in by.items():
    print(name, "Relu of", x[0].tolist(), "is", y[0].tolist())
assert np.isnan(by["onnxruntime"]).sum() == 2, "ONNX Runtime has changed"
assert by["openvino"][0].tolist() == [0, 0, 2, 0], "OpenVINO has changed"
PY
