"""Subcommands of the library."""
