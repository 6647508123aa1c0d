"""Layers whose weight is read by their owner without calling them: an adapter there would be ignored, silently.

By the owner's class: the names of such children; None for all of them.
"""

from collections.abc import Mapping

READERS: Mapping[str, tuple[str, ...] | None] = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    # in evaluation mode it hands all its weights to one fused operator
    "torch.nn.modules.transformer.TransformerEncoderLayer": None,
    "transformers.models.bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention": ("conv1d",),
    "transformers.models.bamba.modeling_bamba.BambaMixer": ("out_proj", "conv1d"),
    "transformers.models.deberta.modeling_deberta.DisentangledSelfAttention": ("in_proj",),
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer": ("out_proj", "conv1d"),
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": (
        "x_proj",
        "dt_proj",
        "out_proj",
        "conv1d",
    ),
    "transformers.models.glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention": ("conv1d",),
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": ("out_proj", "conv1d"),
    "transformers.models.inkling.modeling_inkling.InklingShortConvolution": ("conv1d",),
    "transformers.models.inkling2.modeling_inkling2.Inkling2ShortConvolution": ("conv1d",),
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": ("dt_proj", "conv1d"),
    "transformers.models.kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention": ("conv1d",),
    "transformers.models.lfm2.modeling_lfm2.Lfm2ShortConv": ("conv",),
    "transformers.models.lfm2_moe.modeling_lfm2_moe.Lfm2MoeShortConv": ("conv",),
    "transformers.models.lfm3.modeling_lfm3.Lfm3ShortConv": ("conv",),
    "transformers.models.mamba.modeling_mamba.MambaMixer": ("x_proj", "dt_proj", "out_proj", "conv1d"),
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer": ("out_proj", "conv1d"),
    "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": ("out_proj", "conv1d"),
    "transformers.models.olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet": ("conv1d",),
    "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet": ("conv1d",),
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet": ("conv1d",),
    "transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet": ("conv1d",),
    "transformers.models.qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextGatedDeltaNet": ("conv1d",),
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock": ("conv_1d",),
    "transformers.models.zamba.modeling_zamba.ZambaMambaMixer": ("conv1d",),
    "transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer": ("conv1d",),
}
