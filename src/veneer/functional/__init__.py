"""The maths: tensors in, tensors out. Nothing here knows a module, a config or a file."""
