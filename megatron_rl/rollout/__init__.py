"""Sources of rollouts: environments that sample from the engines, and recorded steps."""
