"""Where a checkpoint comes from: folders, safetensors and torch files, the hub."""
