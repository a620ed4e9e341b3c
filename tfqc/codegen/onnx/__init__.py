"""Programs as ONNX models, for backends whose engines read these."""
