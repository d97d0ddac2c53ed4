"""The `drt` command: one thin file a subcommand."""
