"""The command `ftjax`: one file per sub-command, each with `define_flags(flags, argv)` and `main(flags)`."""
