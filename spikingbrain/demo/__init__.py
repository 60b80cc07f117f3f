"""The demo: the other commands, run as processes as a user would, from nothing to a served model and a report."""
