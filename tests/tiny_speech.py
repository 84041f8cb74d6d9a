"""Tiny speech models of the real classes of transformers, and batches of unequal lengths for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as tf
from tiny import CONFIG, noisy
from torch import nn

from acmize import Plan
from acmize.hosts import make_plan
from acmize.init import collect_moments, init_
from acmize.inputs import Inputs, forward
from acmize.insert import convert_

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 12,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_conv_pos_embeddings": 9,
    "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "pad_token_id": 0,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "vocab_size": 20, "max_source_positions": 20,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
MOONSHINE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "vocab_size": 20, "pad_token_id": 0,
}  # fmt: skip
AST: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4,
    "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8, "num_labels": 5,
}  # fmt: skip
EXAMPLE = 4000  # samples


def _ctc(name: str, **options: Any) -> Any:
    config = getattr(tf, f"{name}Config")(**{**SIZES, **options})
    return lambda: noisy(getattr(tf, f"{name}ForCTC")(config))


HOSTS: dict[str, Any] = {
    "wav2vec2": _ctc("Wav2Vec2"),
    "wav2vec2 pre-norm": _ctc("Wav2Vec2", do_stable_layer_norm=True),
    "wav2vec2 adapters": _ctc("Wav2Vec2", do_stable_layer_norm=True, adapter_attn_dim=4),
    "wav2vec2 group norm": _ctc("Wav2Vec2", feat_extract_norm="group"),
    "hubert": _ctc("Hubert"),
    "hubert pre-norm": _ctc("Hubert", do_stable_layer_norm=True),
    "wavlm": _ctc("WavLM", num_buckets=8, max_bucket_distance=16),
    "wavlm pre-norm": _ctc("WavLM", num_buckets=8, max_bucket_distance=16, do_stable_layer_norm=True),
    "data2vec": _ctc("Data2VecAudio", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    "whisper": lambda: noisy(tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)), 0.1),
    "moonshine": lambda: noisy(tf.MoonshineForConditionalGeneration(tf.MoonshineConfig(**MOONSHINE))),
    "ast": lambda: noisy(tf.ASTForAudioClassification(tf.ASTConfig(**AST))),
}
ALONE = ("wav2vec2 group norm", "data2vec", "moonshine")  # the dense model itself depends on the padding of a batch
PADDED = tuple(name for name in HOSTS if name not in (*ALONE, "whisper", "ast"))


def inputs_for(model: Any, lengths: tuple[int, ...] = (EXAMPLE, EXAMPLE), seed: int = 0) -> Inputs:
    """A batch of noise, zero beyond each length; with a mask where lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    kind, count = model.config.model_type, len(lengths)
    if kind == "whisper":
        tensors = {"input_features": torch.randn(count, 8, 40, generator=generator)}
    elif kind == "audio-spectrogram-transformer":
        return Inputs({"input_values": torch.randn(count, 16, 8, generator=generator)})
    else:
        waves = torch.randn(count, max(lengths), generator=generator)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        tensors = {"input_values": waves * mask}
        if len(set(lengths)) > 1:
            tensors["attention_mask"] = mask.long()
    if model.config.is_encoder_decoder:
        tensors["decoder_input_ids"] = torch.randint(3, 20, (count, 5), generator=generator)
    return Inputs(tensors)


def logits(model: nn.Module, batch: Inputs) -> torch.Tensor:
    return forward(model, batch).logits


def adapted(dense: nn.Module, **kwargs: Any) -> tuple[nn.Module, Plan]:
    """A converted copy with learners from the dense weights, and its plan."""
    plan = make_plan(dense, CONFIG, **kwargs)
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, collect_moments(dense, plan, [inputs_for(dense, (EXAMPLE,) * 4, seed=1)]))
    return model, plan
