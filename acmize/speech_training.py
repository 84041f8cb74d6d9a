"""What phase 3 is for a speech model: the loss of its transcripts, and what of the model is trained, on which frames.

The convolutional front end stays as it was pretrained, as is usual for these families. Frames are masked by SpecAugment
(arXiv 1904.08779) for the adaptive model alone: the dense one that teaches it hears everything. Layers are not skipped
at random (layerdrop), since their gates would have nothing to learn from, and the families' own masking is off.

Shapes: B samples, C channels or classes, T frames, U labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from acmize.errors import AcmizeError
from acmize.hosts_speech import FrontEnd, front_end
from acmize.inputs import Inputs
from acmize.losses import ctc_loss, task_loss
from acmize.phases.finetune import Task
from acmize.recipe import TrainOptions

_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "mask_time_prob", "mask_feature_prob")


def transcript_task(model: Any, smoothing: float = 0.0) -> Task:
    """The loss of transcripts (B, U), -1 behind the last label and where unknown: CTC, or a decoder's cross-entropy."""
    if model.config.is_encoder_decoder:
        return lambda logits, _inputs, labels: (
            logits.new_zeros(()) if labels is None else task_loss(logits.flatten(0, 1), labels.flatten(), smoothing)
        )
    return lambda logits, inputs, labels: (
        logits.new_zeros(()) if labels is None else ctc_loss(logits, _frames(logits, inputs), labels, blank_of(model))
    )


def blank_of(model: Any) -> int:
    """Index of the blank of a CTC model: transformers takes the padding token."""
    return int(model.config.pad_token_id)


def _frames(logits: Tensor, inputs: Any) -> Tensor:
    counts = inputs.counts if isinstance(inputs, Inputs) else None
    return logits.new_full((len(logits),), logits.shape[1], dtype=torch.long) if counts is None else counts.sum(1)


@contextmanager
def training(model: Any, options: TrainOptions, *, whole: bool = False) -> Iterator[None]:
    """Inside, a model is as phase 3 trains it (see the module's docstring); after it, as it was.

    Args:
        model: of speech.
        options: of SpecAugment.
        whole: train the front end too, as for a model from scratch.
    """
    front = front_end(model)
    frozen = (
        [] if front.trained or whole else [p for name in front.modules for p in model.get_submodule(name).parameters()]
    )
    frozen = [p for p in frozen if p.requires_grad]
    places = (model.config, *model.modules())
    before = [(place, name, getattr(place, name)) for place in places for name in _DROPS if name in vars(place)]
    tap, masking = model.get_submodule(front.tap), options.mask_time > 0 or options.mask_channels > 0
    handles = [_mask_at(tap, front, options)] if masking else []
    try:
        for p in frozen:
            p.requires_grad_(False)
        for place, name, _ in before:
            setattr(place, name, 0.0)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for place, name, value in before:
            setattr(place, name, value)
        for handle in handles:
            handle.remove()


def _mask_at(tap: nn.Module, front: FrontEnd, options: TrainOptions) -> Any:
    """Mask what goes through a module in train mode; the masks come from the generators that the loop seeds."""
    mask = masks_of(options)

    def masked(spectrogram: Tensor) -> Tensor:
        return mask(spectrogram) if front.time_last else mask(spectrogram.mT).mT

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        return (masked(args[0]), *args[1:]) if module.training else None

    def after(module: nn.Module, _args: Any, output: Tensor) -> Any:
        return masked(output) if module.training else None

    return tap.register_forward_pre_hook(before) if front.at_input else tap.register_forward_hook(after)


def masks_of(options: TrainOptions) -> Any:
    """A function (B, C, T) -> the same with stretches of time and of channels at their sample's mean."""
    try:
        from torchaudio.functional import mask_along_axis_iid
    except ImportError:
        raise AcmizeError("SpecAugment: torchaudio is missing; pip install 'acmize[speech]'") from None

    def mask(x_BCT: Tensor) -> Tensor:
        hidden = torch.zeros_like(x_BCT)
        for axis, share in ((2, options.mask_time), (1, options.mask_channels)):
            for _ in range(options.masks):
                hidden = mask_along_axis_iid(hidden, int(share * x_BCT.shape[axis]), 1.0, axis)
        return torch.where(hidden > 0, x_BCT.mean((1, 2), keepdim=True), x_BCT)

    return mask


__all__ = ["blank_of", "masks_of", "training", "transcript_task"]
