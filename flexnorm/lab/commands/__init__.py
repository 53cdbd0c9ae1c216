"""Subcommands of the command line that need more than a line: each a typer app that ``flexnorm.lab.cli`` mounts."""
