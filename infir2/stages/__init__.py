"""One module a subcommand: `add_arguments(parser)` and `run(args)`. Wiring only; the work is done below."""
