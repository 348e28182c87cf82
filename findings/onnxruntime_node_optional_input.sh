#!/usr/bin/env bash
# onnxruntime-node 1.30.0: an optional input cannot be given, and what is fed in its name is ignored.
#
# In ONNX, an input with an initializer of the same name has that as its default, and a caller may give
# another value: Python's onnxruntime takes it. The JavaScript binding gives the result of the default
# whatever is fed, under that name or a misspelt one, without an error: a threshold that a caller believes
# to have set is not set. Python raises InvalidArgument for the misspelt one.
# Guess before running it: the input counts, a misspelt one is ignored. Seen: both are ignored.
# Source: the ONNX IR specification (initializers as defaults of inputs); the documentation of
# InferenceSession.run in ONNX Runtime's JavaScript API does not mention other feeds.
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
  assert(!seen.threshold, 'an optional input is no longer ignored')
  assert(!seen.treshold, 'an unknown input is no longer ignored')
}
main().catch(error => { console.error(error); process.exit(1) })
JS
