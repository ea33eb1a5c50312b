"""Families that llama.cpp's own converter knows, and that converter in a process of its own."""
