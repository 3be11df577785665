"""The command `longattn`: one module per subcommand, imported when it is run, so that `--help` needs neither torch nor numpy."""
