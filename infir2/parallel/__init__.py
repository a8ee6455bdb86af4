"""Processes and devices: the torchrun world, and how a single-device model is spread over it."""
