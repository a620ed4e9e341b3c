"""openvino: models of OpenVINO, with FakeQuantize where values are quantized."""
