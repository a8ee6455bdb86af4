"""The dense decoder on one device, with Hugging Face parameter names.

``config`` is the architecture, ``presets`` the ones we ship, ``transformer`` the modules, ``rotary`` the positions and
``attention`` the back ends that are handed to the forward pass. FP8 and parallelism are applied from outside.
"""
