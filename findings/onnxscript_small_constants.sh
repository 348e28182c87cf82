#!/usr/bin/env bash
# onnxscript 0.7.2: optimizer.optimize removes the addition of a constant of 1e-8 or less.
#
# x / (sum(x) + eps) keeps a division finite where all x are 0. With eps = 1e-8, a usual choice, the
# optimiser takes eps for 0 (numpy's allclose, whose absolute tolerance is 1e-8) and drops the addition:
# 0 / 0 is NaN, without a warning. The default export of PyTorch runs this optimiser.
# Guess before running it: removed at 1e-8 and below, as the tolerance says. Seen: so; 2e-8 is kept.
# Source: onnxscript's documentation of the rewrite rules for no-ops, which does not name a tolerance.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    onnxscript==0.7.2 onnx==1.19.1 onnxruntime==1.23.2 numpy==2.3.5
"$home/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
import onnxscript
from onnx import TensorProto, helper, numpy_helper
from onnxscript import optimizer


def shares(eps):
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=1),
        helper.make_node("Add", ["total", "eps"], ["safe"]),
        helper.make_node("Div", ["x", "safe"], ["share"]),
    ]
    of = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in ("x", "share")]
    constant = numpy_helper.from_array(np.array(eps, np.float32), "eps")
    graph = helper.make_graph(nodes, "shares", of[:1], of[1:], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


print("onnxscript", onnxscript.__version__)
seen = {}
for eps in (1e-12, 1e-8, 2e-8):
    for name, change in (("as written", lambda m: m), ("optimised", optimizer.optimize)):
        model = change(shares(eps)).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        (share,) = session.run(None, {"x": np.zeros((1, 3), np.float32)})
        seen[eps, name] = bool(np.isnan(share).all())
        print(f"eps {eps:g}, {name}: shares of zeros {share[0].tolist()}")
assert not any(seen[eps, "as written"] for eps in (1e-12, 1e-8, 2e-8)), "the model has changed"
assert seen[1e-12, "optimised"] and seen[1e-8, "optimised"], "small constants are kept now"
assert not seen[2e-8, "optimised"], "2e-8 is removed, too"
PY
