"""The language model: llama_cpp.Llama, its KV cache, its lock."""
