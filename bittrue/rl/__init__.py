"""Reinforcement learning with rewards from verifiers, on the engine and the trainer of this package."""
