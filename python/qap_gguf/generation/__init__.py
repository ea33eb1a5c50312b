"""From messages to an answer: prompt, prefill, decoding, settings."""
