"""`torch.nn.Linear` and everything derived from it, quantised or not."""

from torch.nn.parameter import UninitializedParameter

from veneer.layers.kinds.kind import Kind, Layer


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _refuse(layer: Layer) -> str | None:
    if isinstance(layer.weight, UninitializedParameter):
        return "its size is not known before its first call; call the model once"
    return None


LINEAR = Kind("linear", _dims, refuse=_refuse)
