"""Encoder, alignment, attention and decoders, one idea per file."""
