"""A run's blend as a folder that runs without Foldrace: weights, or one ONNX graph."""
