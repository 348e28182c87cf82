"""The command `fusenorm`: one module per subcommand, with its arguments."""
