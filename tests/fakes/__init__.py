"""Stand-ins for engines, learners and sources, for tests that start no process."""
