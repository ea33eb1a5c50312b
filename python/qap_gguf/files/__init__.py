"""Files that people bring: GGUF headers, pairs of files, the hub, the packaged model."""
