"""A base in 8 or 4 bits: what run.yaml's `quantization` may be, and what each choice needs.

The weights of the linear layers are rounded while they are loaded; the output head, the embedding and the norms stay.
Adapters, their gradients and the optimizer are as ever.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from veneer.errors import MissingPackageError, RunError
from veneer.train.ranks import shards_model

if TYPE_CHECKING:
    import torch

Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]


@dataclass(frozen=True, slots=True)
class Way:
    """One way of keeping the weights.

    says      for people: "4 bits (nf4, double quantisation) by bitsandbytes"
    package   that does it, of the extra `quant`
    make      (the dtype to compute in, that to pack bytes in) -> transformers' quantization config
    shards    whether FSDP can cut such weights up
    """

    says: str
    package: str
    make: Callable[["torch.dtype", "torch.dtype"], Any]
    shards: bool = False


def _four_bits(kind: str, *, double: bool) -> Callable[["torch.dtype", "torch.dtype"], Any]:
    def make(compute: "torch.dtype", storage: "torch.dtype") -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=storage,
        )

    return make


def _eight_bits(compute: "torch.dtype", storage: "torch.dtype") -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_8(compute: "torch.dtype", storage: "torch.dtype") -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_4(compute: "torch.dtype", storage: "torch.dtype") -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    int4: torch.dtype = vars(torch)["int4"]
    # Int4WeightOnlyConfig has kernels for some GPUs alone
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32)))


WAYS: dict[str, Way] = {
    "nf4": Way(
        "4 bits (nf4, double quantisation) by bitsandbytes", "bitsandbytes", _four_bits("nf4", double=True), shards=True
    ),
    "fp4": Way("4 bits (fp4) by bitsandbytes", "bitsandbytes", _four_bits("fp4", double=False), shards=True),
    "int8": Way("8 bits by bitsandbytes", "bitsandbytes", _eight_bits),
    "torchao-int8": Way("8 bits (weights alone) by torchao", "torchao", _torchao_8),
    "torchao-int4": Way("4 bits (weights alone, groups of 32) by torchao", "torchao", _torchao_4),
}
assert set(WAYS) == set(get_args(Quantization))

# what is meant by names of other tools, or cannot be trained
INSTEAD = {
    "4bit": "nf4 is the usual 4-bit format",
    "8bit": "say int8",
    "int4": "nf4 (bitsandbytes) or torchao-int4 keep 4 bits",
    "qlora": "nf4 is what QLoRA uses",
    "torchao-int4-weight-only": "torchao-int4 runs on every device, CPUs among them",
    "torchao-int8-dynamic": "torchao has no gradient for it: torchao-int8 rounds the weights alone",
    "gptq": "GPTQ needs data to quantise with: name a model that is in GPTQ already, and leave quantization out",
    "awq": "AWQ needs data to quantise with: name a model that is in AWQ already, and leave quantization out",
    "hqq": "transformers 5 does not load HQQ: nf4 comes close",
}


def refuse_unusable(quantization: Quantization | None) -> None:
    """Raise before anything is loaded: MissingPackageError, or RunError where this run cannot shard such weights."""
    if quantization is None:
        return
    way = WAYS[quantization]
    if not find_spec(way.package):
        raise MissingPackageError(
            f"quantization={quantization} needs {way.package}, not installed here. "
            "Install with: pip install 'veneer[quant]'"
        )
    how = shards_model()
    if how == "ZeRO-3" or (how and not way.shards):
        others = "quantization=nf4 with --launch fsdp2, or --launch ddp" if how == "FSDP" else "--launch fsdp2 or ddp"
        raise RunError(f"quantization={quantization}: {how} cannot cut such weights into shards. Take {others}.")


def quantization_config(quantization: Quantization, compute: "torch.dtype") -> Any:
    """What transformers is told. `compute` is the dtype of the layers' inputs and outputs.

    Where the base is cut into shards, bytes are packed in that dtype: FSDP shards nothing but floating point.
    """
    import torch

    return WAYS[quantization].make(compute, compute if shards_model() else torch.uint8)


def refuse_quantised(name: str, config: Any, quantization: Quantization) -> None:
    """Raise RunError if the model's own config says that its weights are quantised already."""
    there: Any = getattr(config, "quantization_config", None)
    if there is None:
        return
    method = there.get("quant_method") if isinstance(there, dict) else getattr(there, "quant_method", None)
    raise RunError(
        f"{name} is quantised already ({getattr(method, 'value', method)}): leave quantization={quantization} out, "
        "or name the model in full precision."
    )


def not_rounded(name: str, quantization: Quantization, error: BaseException) -> str:
    """What to say where a package could not round the weights of a model that it could load."""
    hint = " All widths must be multiples of 32." if quantization == "torchao-int4" else ""
    reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
    return f"{name} cannot be kept in {WAYS[quantization].says}: {reason}.{hint} Try nf4 or int8, or another device."
