"""MLPs and attention of timm's transformers and ConvNeXt; what cannot be cut is refused with the reason."""

from __future__ import annotations

from typing import Any

from torch import nn

from acmize.hosts._registry import Found, handles, plain
from acmize.plan import Refusal, Site


def _drop(module: Any, name: str) -> float:
    return float(getattr(getattr(module, name, None), "p", 0.0))


@handles("timm.layers.Mlp", "timm.layers.ConvMlp")
def _mlp(fqn: str, module: Any) -> Found:
    if not plain(getattr(module, "norm", None)):
        return [Refusal(fqn=fqn, reason=f"a {type(module.norm).__name__} between fc1 and fc2 reads every hidden unit")]
    roles = {"module": fqn, "fc1": f"{fqn}.fc1", "fc2": f"{fqn}.fc2", "act": f"{fqn}.act"}
    drop1 = _drop(module, "drop1") or _drop(module, "drop")
    first = isinstance(module.fc1, nn.Conv2d)
    options = {"channels_first": first, "drop1": drop1, "drop2": _drop(module, "drop2")}
    return [Site(fqn=fqn, kind="mlp", roles=roles, options=options)]


@handles("timm.layers.SwiGLU")
def _swiglu(fqn: str, module: Any) -> Found:
    if not plain(module.norm):
        return [Refusal(fqn=fqn, reason=f"a {type(module.norm).__name__} between fc1 and fc2 reads every hidden unit")]
    roles = {"module": fqn, "fc1": f"{fqn}.fc1_x", "fc1_gate": f"{fqn}.fc1_g", "fc2": f"{fqn}.fc2", "act": f"{fqn}.act"}
    options = {"gated": True, "drop1": _drop(module, "drop1"), "drop2": _drop(module, "drop2")}
    return [Site(fqn=fqn, kind="mlp", roles=roles, options=options)]


@handles("timm.layers.GluMlp")
def _glu(fqn: str, module: Any) -> Found:
    if not plain(module.norm):
        return [Refusal(fqn=fqn, reason=f"a {type(module.norm).__name__} between fc1 and fc2 reads every hidden unit")]
    if isinstance(module.fc1, nn.Conv2d):
        return [Refusal(fqn=fqn, reason="gated MLP of convolutions")]
    roles = {"module": fqn, "fc1": f"{fqn}.fc1", "fc2": f"{fqn}.fc2", "act": f"{fqn}.act"}
    packed = "gate_last" if getattr(module, "gate_last", True) else "gate_first"
    options = {"gated": True, "packed": packed, "drop1": _drop(module, "drop1"), "drop2": _drop(module, "drop2")}
    return [Site(fqn=fqn, kind="mlp", roles=roles, options=options)]


@handles("timm.layers.GlobalResponseNormMlp", "timm.layers.GatedMlp")
def _unsound_mlp(fqn: str, module: Any) -> Found:
    return [Refusal(fqn=fqn, reason=f"{type(module).__name__} mixes hidden units before its second layer")]


@handles(
    "timm.models.vision_transformer.Attention",
    "timm.layers.Attention",
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.AttentionRope",
    "timm.models.eva.EvaAttention",
)
def _attention(fqn: str, module: Any) -> Found:
    rope = "Rope" in type(module).__name__ or "Eva" in type(module).__name__
    if getattr(module, "num_kv_groups", 1) > 1:
        return [Refusal(fqn=fqn, reason="grouped-query attention: heads share keys and values")]
    normed = not (plain(getattr(module, "q_norm", None)) and plain(getattr(module, "k_norm", None)))
    between = not plain(getattr(module, "norm", None)) or getattr(module, "gate", None) is not None
    notes: Found = []
    if rope or normed:
        why = "rotary positions act" if rope else "a norm acts"
        notes.append(Refusal(fqn=f"{fqn}.q, {fqn}.k", reason=f"{why} on q and k before their product"))
    if between:
        notes.append(Refusal(fqn=f"{fqn}.v, {fqn}.proj", reason="a norm or gate lies between the values and proj"))
    if (rope or normed) and between:
        return notes
    options = {"heads": module.num_heads, "rotate_qk": not (rope or normed), "rotate_vo": not between}
    roles = {"out": f"{fqn}.proj"}
    if getattr(module, "qkv", None) is not None:
        if getattr(module, "q_bias", None) is not None:
            return [Refusal(fqn=fqn, reason="its forward reads qkv.weight directly, so qkv cannot be replaced")]
        roles["qkv"] = f"{fqn}.qkv"
    else:
        roles |= {part: f"{fqn}.{part}_proj" for part in "qkv"}
    return [*notes, Site(fqn=fqn, kind="attention", roles=roles, options=options)]


@handles("timm.models.beit.Attention")
def _beit_attention(fqn: str, _module: Any) -> Found:
    return [Refusal(fqn=fqn, reason="its forward reads qkv.weight directly, so qkv cannot be replaced")]


@handles("timm.models.swin_transformer.WindowAttention", "timm.models.swin_transformer_v2.WindowAttention")
def _window_attention(fqn: str, _module: Any) -> Found:
    return [Refusal(fqn=fqn, reason="window attention: only the MLPs of this family are converted")]


@handles("torch.nn.MultiheadAttention")
def _torch_attention(fqn: str, _module: Any) -> Found:
    return [Refusal(fqn=fqn, reason="MultiheadAttention reads its weights past the forward of its layers")]
