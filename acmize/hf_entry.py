"""Saved models under the Auto classes and pipelines of transformers; no code comes from the folder.

    import acmize
    AutoModelForImageClassification.from_pretrained("out")
    AutoModelForCTC.from_pretrained("out")
    pipeline("automatic-speech-recognition", model="out")

Imported, and with it registered, once both acmize and the auto classes of transformers have been (see `after`). Models
of images come in a dress of transformers; those of transformers are themselves.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto import modeling_auto

from acmize.errors import AcmizeError
from acmize.hub import MODEL_TYPE, from_pretrained
from acmize.untrusted import MAX_SIZE
from acmize.weights import MAX_SHARD_SIZE

SPEECH = {  # Auto class -> the table of its architectures
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}


class AcmizeConfig(PreTrainedConfig):
    """The config.json of a saved folder; its `base` is the dense model."""

    model_type = MODEL_TYPE

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        if type(num_classes) is not int or not 0 <= num_classes <= MAX_SIZE:
            raise AcmizeError(f"config.json: num_classes: found {str(num_classes)[:40]!r}; restore the file")
        super().__init__(**kwargs)
        self.num_labels = num_classes


class AcmizeForImageClassification(PreTrainedModel):
    """A converted model in the dress of transformers.

    Attributes:
        model: as `acmize.from_pretrained` gives it.
    """

    config_class = AcmizeConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any, model: nn.Module) -> None:
        super().__init__(config)
        self.model: Any = model

    @classmethod
    def from_pretrained(cls, source: str | Path, *_args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The model of a folder or repository, in eval mode; of the options, revision and token count."""
        model = from_pretrained(source, revision=kwargs.get("revision"), token=kwargs.get("token"))
        return cls(config if config is not None else AcmizeConfig(), model).eval()

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE, **_kwargs: Any
    ) -> None:
        """Write the folder that acmize, timm and transformers load."""
        self.model.save_pretrained(folder, max_shard_size=max_shard_size)

    def set_budget(self, budget: float) -> None:
        """Spend this share of the dense model's MACs."""
        self.model.set_budget(budget)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_kwargs: Any) -> ImageClassifierOutput:
        """(B, C, H, W) images and perhaps (B,) classes -> logits (B, classes) and the cross-entropy."""
        logits = self.model(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


def open_speech(architectures: frozenset[str], head: str, source: Any, *_: Any, config: Any, **options: Any) -> Any:
    """What `from_pretrained` of an Auto class for speech comes to: the converted model itself.

    Args:
        architectures: that the Auto class opens.
        head: its name.
        source: folder or repository.
        config: of that source.
        options: of the caller.

    Raises:
        AcmizeError: a model of another kind, or an option that a converted model does not take.
    """
    base = getattr(config, "base", None)
    found = base.get("architecture") if isinstance(base, dict) else None
    if not isinstance(found, str) or found not in architectures:
        raise AcmizeError(f"{source}: found {found}, which {head} does not open; use the Auto class of its kind")
    dtype = options.get("dtype", options.get("torch_dtype"))
    if str(dtype).removeprefix("torch.") not in ("None", "auto", "float32"):
        raise AcmizeError(f"{source}: found dtype {dtype}, expected float32; run it under torch.autocast instead")
    if options.get("device_map") is not None:
        raise AcmizeError(f"{source}: found a device_map, expected none; move the model with .to(device)")
    return from_pretrained(source, revision=options.get("revision"), token=options.get("token"))


AutoConfig.register(MODEL_TYPE, AcmizeConfig)
AutoModelForImageClassification.register(AcmizeConfig, AcmizeForImageClassification)
for _head, _table in SPEECH.items():
    _opens = frozenset(map(str, getattr(modeling_auto, _table).values()))
    _load = staticmethod(partial(open_speech, _opens, _head))
    _opener: Any = type("Adaptive", (), {"config_class": AcmizeConfig, "from_pretrained": _load})
    getattr(modeling_auto, _head).register(AcmizeConfig, _opener)
