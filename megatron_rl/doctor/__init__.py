"""`python -m megatron_rl.doctor CONFIG`: what this host lacks for a run, one line each."""
