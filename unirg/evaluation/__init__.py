"""Evaluation: figures with intervals, controls, comparisons, and the commands that make them."""
