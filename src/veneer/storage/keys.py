"""How PEFT names the tensors of an adapter file. Pure strings.

>>> factor("model.layers.0.self_attn.q_proj", "lora_A.weight")
'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
"""

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"


def factor(path: str, name: str) -> str:
    """A factor of the adapter on the layer at `path`; `name` is what its kind calls it on disk."""
    return f"{PREFIX}{path}.{name}"


def factor_bias(path: str, name: str = "lora_B.bias") -> str:
    """The bias that an adapter adds (`lora_bias`)."""
    return f"{PREFIX}{path}.{name}"


def magnitude(path: str) -> str:
    """The DoRA magnitude of the adapter on the layer at `path`."""
    return f"{PREFIX}{path}.{MAGNITUDE}"


def bias(path: str, *, adapted: bool) -> str:
    """The trained bias of the module at `path`; PEFT wraps adapted layers, which shows in the name."""
    return f"{PREFIX}{path}.base_layer.bias" if adapted else f"{PREFIX}{path}.bias"


def saved(path: str, parameter: str) -> str:
    """A parameter of a module trained in full."""
    return f"{PREFIX}{path}.{parameter}"


def base_weight(path: str) -> str:
    """The base weight that PEFT adds to the file when an embedding or output head is adapted."""
    return f"{PREFIX}{path}.base_layer.weight"


def base_parameter(path: str, parameter: str) -> str:
    """The same for any parameter of the layer."""
    return f"{PREFIX}{path}.base_layer.{parameter}"


def token_rows(path: str) -> str:
    """The rows of the embedding at `path` that are trained in full (`trainable_token_indices`)."""
    return f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"


def below_token_rows(path: str) -> str:
    """The weight of an embedding whose rows are trained, which PEFT adds to the file after a resize."""
    return f"{PREFIX}{path}.token_adapter.base_layer.weight"


def inside_saved(path: str, parameter: str) -> tuple[str, str]:
    """Two more names under which PEFT repeats the bias of a saved module when `bias="all"`."""
    return f"{PREFIX}{path}.modules_to_save.{parameter}", f"{PREFIX}{path}.original_module.{parameter}"


def is_inside_saved(key: str, path: str, parameter: str) -> bool:
    """Whether a key repeats so a parameter deeper in a saved module, where the adapter's name stays in the key."""
    start, end = f"{PREFIX}{path}.modules_to_save.", f".{parameter}"
    return key.startswith(start) and key.endswith(end) and "." not in key[len(start) : -len(end)]
