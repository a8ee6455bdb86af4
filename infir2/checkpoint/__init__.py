"""Durable state: verified training checkpoints (store) and Hugging Face folders in and out (huggingface)."""
