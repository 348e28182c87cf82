#!/usr/bin/env bash
# onnxruntime-node 1.30.0: an input that the model does not have is ignored without an error.
#
# A model whose input `threshold` has a default (an initializer of the same name) gives the verdicts of
# the default if the caller misspells the name, or if a tool has folded the input away: nothing says so.
# Python's onnxruntime raises InvalidArgument for the same feed.
# Guess before running it: no error, and the verdict of the default. Seen: so.
# Source: the documentation of InferenceSession.run in ONNX Runtime's JavaScript API: feeds are "model
# inputs"; what others do is not said.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check onnx==1.19.1 numpy==2.3.5
venv/bin/python - <<'PY'
import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

node = helper.make_node("Less", ["score", "threshold"], ["ood"])
inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("score", "threshold")]
output = helper.make_tensor_value_info("ood", TensorProto.BOOL, [1])
default = numpy_helper.from_array(np.array([0.5], np.float32), "threshold")
graph = helper.make_graph([node], "verdict", inputs, [output], [default])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "it.onnx")
PY
ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --no-fund --no-audit onnxruntime-node@1.30.0 >/dev/null
node - <<'JS'
const ort = require('onnxruntime-node'), assert = require('assert')
async function main() {
  console.log('onnxruntime-node', require('onnxruntime-node/package.json').version)
  const session = await ort.InferenceSession.create('it.onnx', {logSeverityLevel: 3})
  const one = value => new ort.Tensor('float32', [value], [1])
  const seen = {}
  for (const name of ['threshold', 'treshold']) {
    const {ood} = await session.run({score: one(0.7), [name]: one(0.9)})
    seen[name] = Boolean(ood.data[0])
    console.log(`score 0.7, ${name} 0.9: OOD is ${seen[name]}`)
  }
  assert(seen.threshold, 'the input is no longer used')
  assert(!seen.treshold, 'an unknown input is no longer ignored')
}
main().catch(error => { console.error(error); process.exit(1) })
JS
