"""Exports of a model or an adapter for the programs that run them."""
