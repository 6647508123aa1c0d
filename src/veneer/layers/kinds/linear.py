"""`torch.nn.Linear` and everything derived from it, quantised or not."""

from veneer.layers.kinds.kind import Kind, Layer, not_yet_sized


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


LINEAR = Kind("linear", _dims, refuse=not_yet_sized)
