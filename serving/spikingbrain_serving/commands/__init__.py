"""Subcommands of `spikingbrain`, one module each."""
