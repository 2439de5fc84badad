"""Arithmetic on what fine-tunes leave behind: merge, mix, extract, resize, convert. Files in, files out, as streams."""
