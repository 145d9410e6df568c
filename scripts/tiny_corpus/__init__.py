"""Generators of the text that `tiny` is pretrained on and of the five shipped data sets."""
