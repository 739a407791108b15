"""Searches over a trained model."""
