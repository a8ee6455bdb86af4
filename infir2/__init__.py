"""infir2: train reasoning language models in FP8, from raw text to an evaluated model."""

__version__ = "0.1.0"
