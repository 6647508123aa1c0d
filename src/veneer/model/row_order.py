"""Layers that do not see the rows of a batch one after the other in their first dimension.

There, what belongs to which row cannot be told, and an adapter cannot serve some rows, or some tokens of a row, only.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from veneer.layers.kinds import class_names
from veneer.layers.swap import base_class
from veneer.layers.walk import finder
from veneer.targets import Site

# Classes inside which the first dimension is another one: tokens, say.
_ROWS_ELSEWHERE = frozenset(
    {
        "transformers.models.bridgetower.modeling_bridgetower.BridgeTowerVisionTransformer",
        "transformers.models.bros.modeling_bros.BrosSpadeEEForTokenClassification",
        "transformers.models.clipseg.modeling_clipseg.CLIPSegDecoder",
        "transformers.models.fsmt.modeling_fsmt.FSMTModel",
        "transformers.models.led.modeling_led.LEDEncoderSelfAttention",
        "transformers.models.longformer.modeling_longformer.LongformerSelfAttention",
        "transformers.models.mask2former.modeling_mask2former.Mask2FormerTransformerModule",
        "transformers.models.oneformer.modeling_oneformer.OneFormerTransformerModule",
        "transformers.models.xlnet.modeling_xlnet.XLNetModel",
    }
)


def layers_without_rows(model: nn.Module, sites: Iterable[Site]) -> Iterator[str]:
    """A sentence for each site of that kind, beginning with its path."""
    find = finder(model)
    for site in sites:
        parts = site.path.split(".")
        owners = (find(".".join(parts[:depth])) for depth in range(len(parts)))
        owner = next((owner for owner in owners if not _ROWS_ELSEWHERE.isdisjoint(class_names(type(owner)))), None)
        if "experts" in parts:
            yield f"{site.path}: an expert sees tokens of several rows, mixed"
        elif site.by_weight:
            yield f"{site.name}, which is read as one weight for all rows"
        elif owner is not None:
            yield f"{site.path}: {base_class(owner).__name__} does not keep row after row"
