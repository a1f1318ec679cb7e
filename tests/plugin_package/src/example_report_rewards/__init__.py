"""Rewards for UniRG from a package of their own."""
