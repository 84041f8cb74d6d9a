"""Speech models of transformers by name or folder: weights from safetensors, no remote code, and their processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acmize.checkpoint import read_json
from acmize.errors import AcmizeError
from acmize.hosts_speech import is_speech
from acmize.weights import INDEX, read_index, weights_in

# Never taken from a file: what says where code or weights come from.
DROPPED = ("auto_map", "custom_pipelines", "_name_or_path", "trust_remote_code", "quantization_config")


@dataclass(frozen=True)
class Processor:
    """What stands around a speech model: waveforms to inputs, token ids to text.

    Attributes:
        features: feature extractor of transformers.
        tokenizer: of transformers; None where the model emits no text.
    """

    features: Any
    tokenizer: Any

    @property
    def rate(self) -> int:
        """Sampling rate of the model in Hz."""
        return int(self.features.sampling_rate)

    def save(self, folder: Path) -> None:
        """Write both as transformers does, so that `AutoProcessor` and this package find them."""
        self.features.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def is_folder(name: str | Path) -> bool:
    """Whether a folder holds a model as transformers saves it, and none of ours."""
    config = Path(name) / "config.json"
    found = read_json(config) if config.is_file() else None
    return isinstance(found, dict) and "model_type" in found and "acmize" not in found


def load(name: str | Path) -> nn.Module:
    """A speech model in eval mode, float32, with its `processor`, from a folder or a Hub repository.

    Raises:
        AcmizeError: not there, not a speech model, no safetensors.
    """
    cls, _ = _known(name)
    if Path(name).is_dir() and (found := weights_in(Path(name))) is not None and found.name == INDEX:
        read_index(found)  # transformers would follow it anywhere
    try:
        model: Any = cls.from_pretrained(str(name), dtype=torch.float32, use_safetensors=True).eval()
    except Exception as error:  # many kinds, by what is missing or damaged
        raise AcmizeError(f"model {name}: expected model.safetensors that fits, found: {_first(error)}") from None
    attach_processor(model, name)
    return model


def architecture(name: str | Path) -> nn.Module:
    """The model with random weights, which is all that a plan needs."""
    cls, config = _known(name)
    return cls(config).eval()


def attach_processor(model: Any, source: str | Path) -> None:
    """Give a model the processor that lies beside its weights, where there is one."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    try:
        features = AutoFeatureExtractor.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return
    except Exception as error:  # any kind: the file may hold anything
        raise AcmizeError(f"{source}: its feature extractor is damaged ({_first(error)}); restore the file") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = None
    except Exception as error:  # any kind: the file may hold anything
        raise AcmizeError(f"{source}: its tokenizer is damaged ({_first(error)}); restore the file") from None
    model.processor = Processor(features, tokenizer)


def attach_generation(model: Any, source: Path) -> None:
    """Give a model that writes text the defaults of generation that were saved with it."""
    from transformers import GenerationConfig

    if (source / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source)
        except Exception as error:  # any kind: the file may hold anything
            raise AcmizeError(f"{source}: generation_config.json is damaged ({_first(error)}); restore it") from None


def processor_of(model: Any) -> Processor:
    """The processor of a model.

    Raises:
        AcmizeError: it has none.
    """
    found = getattr(model, "processor", None)
    if found is None:
        raise AcmizeError(
            f"{type(model).__name__}: found no processor, expected a feature extractor; set model.processor = "
            "acmize.hf_models.Processor(feature_extractor, tokenizer)"
        )
    return found


def base_of(model: Any) -> dict[str, Any]:
    """How to build this model again, as `hub.base_of` has it."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in DROPPED}
    return {
        "library": "transformers",
        "architecture": type(model).__name__,
        "kwargs": {},
        "pretrained_cfg": {**config, "dtype": "float32"},
    }


def build(base: dict[str, Any]) -> nn.Module:
    """The model of a base with random weights.

    Raises:
        AcmizeError: a class or configuration that the installed transformers does not know.
    """
    import transformers

    name, config = base["architecture"], {k: v for k, v in base["pretrained_cfg"].items() if k not in DROPPED}
    try:
        cls = _class(name)
        model = cls(transformers.AutoConfig.for_model(**config))
        return model.to("meta") if torch.get_default_device().type == "meta" else model  # some make tensors elsewhere
    except AcmizeError:
        raise
    except Exception as error:  # any kind: the configuration comes from a file
        raise AcmizeError(
            f"base model {name!r} cannot be built by transformers {transformers.__version__} ({_first(error)}); "
            "restore config.json, or install the version it was saved with"
        ) from None


def _known(name: str | Path) -> tuple[Any, Any]:
    """Class and configuration of a name."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:  # many kinds: no network, no such repository, a configuration it does not know
        raise AcmizeError(f"model {name}: not to be had as a model of transformers ({_first(error)})") from None
    names = config.architectures or [""]
    return _class(names[0]), config


def _class(name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel) or not is_speech(cls):
        raise AcmizeError(f"architecture {name!r}: expected a speech model of transformers, such as Wav2Vec2ForCTC")
    return cls


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:400]
