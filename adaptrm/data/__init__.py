"""Pairs, conversations, score folders and the training pipeline."""
