"""Classifiers: backbones, stacks, heads and their weights."""
