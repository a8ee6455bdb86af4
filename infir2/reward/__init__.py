"""Rewards: a response and its label in, a score out. Pure text; no torch. What a response holds is never trusted."""
