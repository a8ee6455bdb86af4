"""Tensors in, tensors out. ``reference`` defines the numerics in plain torch; the other files make them fast."""
