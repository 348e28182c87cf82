"""The command ``fusenorm``: one module per subcommand, its arguments beside what it does."""
