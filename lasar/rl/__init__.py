"""Reinforcement learning of the policy and of its depth (paper section 3.5): rollouts, rewards, losses, the loop."""
