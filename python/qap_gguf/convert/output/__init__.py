"""Writing GGUF files: plans, room on the disk, quantization."""
