"""Converted models of images under `AutoModelForImageClassification.from_pretrained(FOLDER or USER/NAME)`.

Imported, and with it registered, once both acmize and the auto classes of transformers have been (see `after`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from acmize.hub import MODEL_TYPE, from_pretrained


class AcmizeConfig(PreTrainedConfig):
    """The config.json of a saved folder."""

    model_type = MODEL_TYPE

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
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

    def save_pretrained(self, folder: str | Path, **_kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the folder that acmize, timm and transformers load."""
        self.model.save_pretrained(folder)

    def set_budget(self, budget: float) -> None:
        """Spend this share of the dense model's MACs."""
        self.model.set_budget(budget)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_kwargs: Any) -> ImageClassifierOutput:
        """(B, C, H, W) images and perhaps (B,) classes -> logits (B, classes) and the cross-entropy."""
        logits = self.model(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


AutoConfig.register(MODEL_TYPE, AcmizeConfig)
AutoModelForImageClassification.register(AcmizeConfig, AcmizeForImageClassification)
