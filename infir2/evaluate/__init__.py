"""How good is a model? Samples for the problems of a task, scores for the samples, averages with their intervals."""
