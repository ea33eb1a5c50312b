"""LLaVA checkpoints: what config.json and tensors say, and what GGUF files need of them."""
