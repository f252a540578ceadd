"""Where rollouts come from: environments that sample from the engines, or recorded steps."""
