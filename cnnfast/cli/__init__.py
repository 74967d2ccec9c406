"""The command `cnnfast`: a subcommand a file, each with `add_parser` and `run`."""
