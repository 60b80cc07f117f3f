"""Subcommands of the trainer."""
