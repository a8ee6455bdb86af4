"""Reinforcement learning: the one floor that joins trainer and rollout engine."""
