"""From adapters to what phones run: Core ML packages, ONNX models, and the proof that they compute the same."""
