"""FP8 as a property of layers: recipes, the FP8 linear layer, conversion by rule, and health telemetry."""
