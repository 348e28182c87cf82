#!/usr/bin/env bash
# openvino 2026.4.1: convert_model gives a constant of an ONNX file another shape and loses its name.
#
# Who patches a converted program (calibration scores, class prototypes, thresholds) looks for its
# constants by the names that they have in the ONNX file. read_model keeps name and shape of a vector
# that is compared with a matrix. convert_model, of the same file, makes it a matrix of one row, whose
# name is a number that changes from model to model. Stored as a matrix of one row, it keeps its name.
# Guess before running it: both functions read the file alike, and names survive in both.
# Source: the conversion guide, which has read_model and convert_model as two ways to one model.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    openvino==2026.4.1 onnx==1.19.1 numpy==2.3.5
cd "$home"
"$home/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper


def write(shape):
    """How many of three limits are at most x, with the limits as an array of a shape."""
    nodes = [
        helper.make_node("LessOrEqual", ["limits", "x"], ["at_most"]),
        helper.make_node("Cast", ["at_most"], ["counted"], to=TensorProto.INT32),
        helper.make_node("ReduceSum", ["counted", "axes"], ["rank"], keepdims=0),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1])
    rank = helper.make_tensor_value_info("rank", TensorProto.INT32, [None])
    constants = [
        numpy_helper.from_array(np.arange(3, dtype=np.float32).reshape(shape), "limits"),
        numpy_helper.from_array(np.array([1]), "axes"),
    ]
    graph = helper.make_graph(nodes, "ranks", [x], [rank], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, "ranks.onnx")


def constants(model):
    found = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return {op.get_friendly_name(): list(op.shape) for op in found if list(op.shape) != [1]}


print("openvino", openvino.__version__)
seen = {}
for shape in ((3,), (1, 3)):
    write(shape)
    read = openvino.Core().read_model("ranks.onnx")
    converted = openvino.convert_model("ranks.onnx")
    seen[shape] = constants(read), constants(converted)
    print("limits", list(shape), "read_model", seen[shape][0], "convert_model", seen[shape][1])
assert seen[3,][0] == {"limits": [3]}, "read_model has changed"
assert list(seen[3,][1].values()) == [[1, 3]], "convert_model keeps the shape"
assert "limits" not in seen[3,][1], "convert_model keeps the name"
assert seen[1, 3] == ({"limits": [1, 3]}, {"limits": [1, 3]}), "a matrix has changed"
PY
