"""Speech transformers of Hugging Face transformers: what can be made adaptive in which class.

Classes are told by their exact import path, so that transformers need not be imported. Forwards read in versions 5.0
and 5.23. Layers are replaced, attention functions (eager, sdpa, flash) are not: they read shapes that do not change.

    Wav2Vec2, HuBERT, Data2VecAudio   MLPs; q, k, v, out rotated
    WavLM                             MLPs; its attention hands the weights of its layers to a function of torch
    Whisper                           encoder: MLPs; q, k, v, out rotated
    Moonshine                         encoder: MLPs; v, out rotated; q, k in pairs, since rotary positions act on them;
                                      second and third convolution, frame by frame
    AST                               MLPs; q, k, v, out rotated
    decoders                          MLPs, when asked for; attention stays dense

Shapes: B samples, L samples of audio, T frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acmize.inputs import Inputs
from acmize.padding import class_path, locates
from acmize.plan import Refusal, Site

Found = list[Site | Refusal]
Handler = Callable[[str, Any], Found]
HANDLERS: dict[str, Handler] = {}

_FAMILIES = {
    "wav2vec2": "Wav2Vec2",
    "hubert": "Hubert",
    "wavlm": "WavLM",
    "data2vec": "Data2VecAudio",
}


def _path(folder: str, name: str) -> str:
    file = "data2vec_audio" if folder == "data2vec" else folder
    return f"transformers.models.{folder}.modeling_{file}.{name}"


def _all(ending: str, *without: str) -> list[str]:
    return [_path(folder, name + ending) for folder, name in _FAMILIES.items() if folder not in without]


_WHISPER = "transformers.models.whisper.modeling_whisper"
_MOONSHINE = "transformers.models.moonshine.modeling_moonshine"
_AST = "transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer"
_DECODER = "a decoder; budgets count the encoder, name it with --target-modules to convert it"


def _handles(*paths: str) -> Callable[[Handler], Handler]:
    def decorate(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(paths, handler))
        return handler

    return decorate


# --- MLPs -----------------------------------------------------------------------------------------------------


def _mlp(fqn: str, module: Any, names: tuple[str, str, str], **options: Any) -> Found:
    """An MLP module with its layers and activation as children of these names."""
    fc1, fc2, act = names
    roles = {"fc1": f"{fqn}.{fc1}", "fc2": f"{fqn}.{fc2}"}
    if isinstance(getattr(module, act), nn.Module):  # a function has no path: the layers are replaced one by one
        roles |= {"module": fqn, "act": f"{fqn}.{act}"}
    elif options.get("gated"):
        return [Refusal(fqn=fqn, reason=f"its activation {act} is a function, expected a module")]
    return [Site(fqn=fqn, kind="mlp", roles=roles, options=options)]


@_handles(*_all("FeedForward"))
def _feed_forward(fqn: str, module: Any) -> Found:
    drop = {"drop1": module.intermediate_dropout.p, "drop2": module.output_dropout.p}
    return _mlp(fqn, module, ("intermediate_dense", "output_dense", "intermediate_act_fn"), **drop)


@_handles(f"{_MOONSHINE}.MoonshineEncoderMLP")
def _plain_mlp(fqn: str, module: Any) -> Found:
    return _mlp(fqn, module, ("fc1", "fc2", "activation_fn"))


@_handles(f"{_MOONSHINE}.MoonshineDecoderMLP")
def _gated_decoder_mlp(fqn: str, module: Any) -> Found:
    names = ("fc1", "fc2", "activation_fn")
    return _mlp(fqn, module, names, gated=True, packed="gate_last", only_if_asked=_DECODER)


@_handles(f"{_WHISPER}.WhisperEncoderLayer")
def _whisper_encoder_layer(fqn: str, module: Any) -> Found:
    site = Site(fqn=f"{fqn}.fc1", kind="mlp", roles={"fc1": f"{fqn}.fc1", "fc2": f"{fqn}.fc2"})
    return [*_attention(f"{fqn}.self_attn", module.self_attn), site]


@_handles(f"{_WHISPER}.WhisperDecoderLayer")
def _whisper_decoder_layer(fqn: str, module: Any) -> Found:
    roles, options = {"fc1": f"{fqn}.fc1", "fc2": f"{fqn}.fc2"}, {"only_if_asked": _DECODER}
    site = Site(fqn=f"{fqn}.fc1", kind="mlp", roles=roles, options=options)
    return [*(r for name in ("self_attn", "encoder_attn") for r in _decoder_attention(f"{fqn}.{name}")), site]


# --- attention ------------------------------------------------------------------------------------------------


def _roles(fqn: str, *names: str) -> dict[str, str]:
    return {role: f"{fqn}.{name}" for role, name in zip(("q", "k", "v", "out"), names, strict=True)}


@_handles(*_all("Attention", "wavlm"))
def _attention(fqn: str, module: Any) -> Found:
    roles = _roles(fqn, "q_proj", "k_proj", "v_proj", "out_proj")
    return [Site(fqn=fqn, kind="attention", roles=roles, options={"heads": module.num_heads})]


@_handles(_path("wavlm", "WavLMAttention"))
def _wavlm_attention(fqn: str, _module: Any) -> Found:
    return [Refusal(fqn=fqn, reason="its forward hands the weights of its layers to multi_head_attention_forward")]


@_handles(f"{_MOONSHINE}.MoonshineAttention")
def _moonshine_attention(fqn: str, module: Any) -> Found:
    if fqn.endswith(".encoder_attn") or ".decoder." in f".{fqn}":
        return _decoder_attention(fqn)
    if module.num_key_value_groups > 1:
        return [Refusal(fqn=fqn, reason="grouped-query attention: heads share keys and values")]
    heads = module.q_proj.out_features // module.head_dim
    roles = _roles(fqn, "q_proj", "k_proj", "v_proj", "o_proj")
    paired = module.head_dim % 2 == 0  # dimensions 2i and 2i + 1 turn together
    site = Site(
        fqn=fqn, kind="attention", roles=roles, options={"heads": heads, "rotate_qk": False, "paired_qk": paired}
    )
    if paired:
        return [site]
    reason = "rotary positions act on q and k, and its heads have an odd width"
    return [Refusal(fqn=f"{fqn}.q_proj, {fqn}.k_proj", reason=reason), site]


def _decoder_attention(fqn: str) -> Found:
    return [Refusal(fqn=fqn, reason="attention of a decoder: its keys and values are kept between tokens")]


def _ast_attention(fqn: str, module: Any) -> Found:
    if hasattr(module, "q_proj"):
        roles, heads = _roles(fqn, "q_proj", "k_proj", "v_proj", "o_proj"), module.num_attention_heads
    else:  # up to transformers 5.0
        names = ("attention.query", "attention.key", "attention.value", "output.dense")
        roles, heads = _roles(fqn, *names), module.attention.num_attention_heads
    return [Site(fqn=fqn, kind="attention", roles=roles, options={"heads": heads})]


@_handles(f"{_AST}.ASTLayer")
def _ast_layer(fqn: str, module: Any) -> Found:
    """Up to transformers 5.0 the MLP of a block is no module of its own."""
    found = _ast_attention(f"{fqn}.attention", module.attention)
    if hasattr(module, "mlp"):
        return [*found, *_plain_mlp(f"{fqn}.mlp", module.mlp)]
    roles = {"fc1": f"{fqn}.intermediate.dense", "fc2": f"{fqn}.output.dense"}
    return [*found, Site(fqn=f"{fqn}.intermediate", kind="mlp", roles=roles)]


# --- which frames are real ------------------------------------------------------------------------------------


_BLOCKS = (*_all("Encoder"), *_all("EncoderStableLayerNorm", "data2vec"))


@locates(*_BLOCKS)
def _frames(_encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return None if mask is None or mask.dim() != 2 else mask.bool()


_MOONSHINE_STRIDE = 64 * 3 * 2  # of its convolutions, as its own forward has it


@locates(f"{_MOONSHINE}.MoonshineEncoder")
def _moonshine_frames(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is None:
        return None
    frames = int(encoder._get_feat_extract_output_lengths(mask.shape[-1]))
    return mask[..., ::_MOONSHINE_STRIDE][..., :frames].bool()


def alone_only(model: Any) -> str | None:
    """Why a sample's output depends on the padding of its batch in the dense model itself, or None if it does not."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "moonshine":
        return "its convolutions are normalised over the whole batch's length"
    if getattr(config, "model_type", None) == "data2vec-audio" and config.num_conv_pos_embeddings > 1:
        return "its positional convolutions are stacked: what the first makes of padding reaches the second"
    if getattr(config, "feat_extract_norm", None) == "group":
        return "its first convolution is normalised over the whole batch's length"
    return None


# --- front ends -----------------------------------------------------------------------------------------------


def front_sites(fqn: str, module: Any) -> list[Site]:
    """Convolutions of a module's front end that can be made adaptive, frame by frame; the first reads samples alone."""
    if class_path(module) != f"{_MOONSHINE}.MoonshineEncoder":
        return []
    second, third = f"{fqn}.conv2", f"{fqn}.conv3"
    return [
        Site(fqn=second, kind="linear", roles={"module": second}, options={"reader": third}),
        Site(fqn=third, kind="linear", roles={"module": third}),
    ]


@dataclass(frozen=True, kw_only=True)
class FrontEnd:
    """What makes frames of samples.

    Attributes:
        modules: paths of its layers.
        tap: path of the module whose output is its spectrogram, (B, channels, T); with `at_input`, whose input is.
        at_input: whether it is the input.
        time_last: whether the axes are as above; False: (B, T, channels).
        trained: whether training reaches it; the convolutions over waveforms are left as they were pretrained.
    """

    modules: tuple[str, ...]
    tap: str
    at_input: bool = False
    time_last: bool = True
    trained: bool = False


_FRONT_ENDS: dict[str, Callable[[str], FrontEnd]] = {
    **dict.fromkeys(_all("FeatureEncoder"), lambda path: FrontEnd(modules=(path,), tap=path)),
    f"{_MOONSHINE}.MoonshineEncoder": lambda path: FrontEnd(
        modules=tuple(f"{path}.{name}" for name in ("conv1", "groupnorm", "conv2", "conv3")), tap=f"{path}.conv3"
    ),
    f"{_WHISPER}.WhisperEncoder": lambda path: FrontEnd(
        modules=(f"{path}.conv1", f"{path}.conv2"), tap=f"{path}.conv1", at_input=True
    ),
    f"{_AST}.ASTEmbeddings": lambda path: FrontEnd(
        modules=(path,), tap=path, at_input=True, time_last=False, trained=True
    ),
}


def front_end(model: Any) -> FrontEnd:
    """The front end of a speech model."""
    known = ((_FRONT_ENDS.get(class_path(module)), path) for path, module in model.named_modules())
    return next(made(path) for made, path in known if made is not None)


# --- example inputs, what the budget counts -------------------------------------------------------------------

FRAMES = 500  # of the example: 10 s for wav2vec2, 12 s for Moonshine
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")


def is_speech(model: Any) -> bool:
    """Whether this is a model of transformers that takes audio."""
    cls = model if isinstance(model, type) else type(model)
    if not cls.__module__.startswith("transformers."):
        return False
    return getattr(model, "main_input_name", None) in ("input_values", "input_features")


def example_speech(model: Any, frames: int = FRAMES) -> Inputs:
    """Zeros for one utterance of about so many frames; families of fixed length take their own."""
    config = model.config
    like = next(model.parameters())
    if config.model_type == "whisper":
        shape: tuple[int, ...] = (1, config.num_mel_bins, 2 * config.max_source_positions)
    elif config.model_type == "audio-spectrogram-transformer":
        shape = (1, config.max_length, config.num_mel_bins)
    else:
        shape = (1, frames * _stride(model))
    tensors = {model.main_input_name: torch.zeros(shape, device=like.device, dtype=like.dtype)}
    if config.is_encoder_decoder:
        start = config.decoder_start_token_id or 0
        tensors["decoder_input_ids"] = torch.full((1, 1), start, device=like.device)
    return Inputs(tensors)


def frames_of(model: Any, samples: float) -> int:
    """About how many frames so many samples of audio make; at least 8."""
    return max(8, round(samples / _stride(model)))


def _stride(model: Any) -> int:
    return getattr(model.config, "inputs_to_logits_ratio", _MOONSHINE_STRIDE)


def has_fixed_length(model: Any) -> bool:
    """Whether every utterance is brought to one length (Whisper, AST)."""
    return model.config.model_type in ("whisper", "audio-spectrogram-transformer")


def blocks_path(model: Any) -> str:
    """Path of what holds the encoder's blocks: with a decoder the whole encoder, else behind the front end if apart."""
    apart = (path for path, module in model.named_modules() if class_path(module) in _BLOCKS)
    return encoder_path(model) or next(apart, model.base_model_prefix)


def encoder_path(model: Any) -> str:
    """Path of the encoder of a speech-to-text model; "" where the model is its own."""
    if not model.config.is_encoder_decoder:
        return ""
    encoder = model.get_encoder()
    return next(path for path, module in model.named_modules() if module is encoder)
