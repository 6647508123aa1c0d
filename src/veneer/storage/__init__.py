"""Files. This room knows `dict[str, Tensor]` and JSON, never a module or a config, and reads nothing it must run."""
