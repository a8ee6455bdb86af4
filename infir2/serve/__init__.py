"""OpenAI-compatible HTTP over the rollout engine: any number of clients, one thread that steps, nothing held for those
who have gone."""
