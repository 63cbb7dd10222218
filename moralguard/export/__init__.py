"""ONNX decoders with a cache from Hugging Face models: ``moralguard export``."""
