"""onnx: models that onnxruntime and others run, with QuantizeLinear and DequantizeLinear where values are quantized."""
