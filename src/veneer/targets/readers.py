"""Layers whose weight is read by their owner without calling them: an adapter there would be ignored, silently.

By the owner's class: the names of such children; None for all of them.
"""

from collections.abc import Mapping

READERS: Mapping[str, tuple[str, ...] | None] = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    # in evaluation mode it hands all its weights to one fused operator
    "torch.nn.modules.transformer.TransformerEncoderLayer": None,
    "transformers.models.bamba.modeling_bamba.BambaMixer": ("out_proj",),
    "transformers.models.deberta.modeling_deberta.DisentangledSelfAttention": ("in_proj",),
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer": ("out_proj",),
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": ("out_proj",),
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": ("dt_proj",),
    "transformers.models.mamba.modeling_mamba.MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer": ("out_proj",),
    "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": ("out_proj",),
}
