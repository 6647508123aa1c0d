"""Linear layers that keep their weight packed in ways of their own, and are no `torch.nn.Linear`.

A plain adapter needs no more of a layer than its size and its output. Shapes: I in, O out.
"""

from veneer.layers.kinds.kind import Kind, Layer

HQQ_LINEAR = "hqq.core.quantize.HQQLinear"
PACKED_CLASSES = (
    HQQ_LINEAR,
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear",  # of GPTQ and AWQ
    "awq.modules.linear.gemm.WQLinear_GEMM",
    "aqlm.inference.QuantizedLinear",
    "eetq.modules.qlinear.EetqLinear",
    "transformers.integrations.eetq.EetqLinear",
)


def _dims(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


PACKED = Kind("linear", _dims)
