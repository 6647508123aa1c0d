"""One layer at a time: adapters, how they are attached, which of them act."""
