"""ONNX causal language models on onnxruntime, in NumPy arrays. Nothing here imports torch or transformers."""
