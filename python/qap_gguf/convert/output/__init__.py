"""Writing GGUF files: plans, temporary names, room on the disk, quantization."""
