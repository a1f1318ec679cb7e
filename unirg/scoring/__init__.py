"""Scoring: the reward contract, the registry that finds rewards, and the engine that runs them."""
