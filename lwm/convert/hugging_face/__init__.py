"""Hugging Face's directories of transformers models."""
