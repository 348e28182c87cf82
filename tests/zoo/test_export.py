"""Networks of the catalogue as exported programs."""

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm
from tests.export.programs import needs_export
from tests.zoo.networks import build

for library in ("timm", "transformers"):
    pytest.importorskip(library, reason="the catalogue needs the extra zoo: pip install '.[zoo]'")
pytestmark = needs_export

NETWORKS = {
    "torchvision:resnet18": 64,
    "timm:convnextv2_atto": 64,
    "timm:vit_tiny_patch16_224": 64,
    "transformers:SwinForImageClassification": 64,
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_exported_for_batches_of_any_size(network, tmp_path):
    import onnxruntime

    size = NETWORKS[network]
    images = torch.randn(40, 3, size, size, generator=torch.Generator().manual_seed(1))
    net = build(network, images[:8])
    detector = FuseNorm(net).fit([images[:21]]).calibrate([images[21:]])
    path = detector.export(tmp_path / "detector.onnx", shape=(3, size, size)).path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for part in (images[:1], images[1:4], images[4:12]):
        logits, conf, _ = session.run(None, {"image": part.numpy()})
        pred, expected = detector.predict(part)
        assert logits.argmax(1).tolist() == pred.tolist()
        np.testing.assert_allclose(conf, expected, rtol=1e-4, atol=1e-4)
