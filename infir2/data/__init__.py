"""Bytes to batches: raw text, token shards, and a data order that is a pure function of (seed, step)."""
