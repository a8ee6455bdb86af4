"""The training loop and its parts. Knows no stage: saving and evaluating come in as callbacks."""
