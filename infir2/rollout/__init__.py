"""Generation with the trainer's own model: requests in, tokens with the log-probabilities they were sampled at out."""
