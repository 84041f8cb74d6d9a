"""The Auto classes and pipelines of transformers open adaptive models, once acmize is imported, before or after it.

    import acmize
    AutoModelForCTC.from_pretrained("out")
    pipeline("automatic-speech-recognition", model="out")

A saved config.json says `model_type: acmize`, which transformers without acmize refuses; no code comes from the folder.
`import acmize` does not import transformers for this: a finder of modules sees when the two with its tables are
imported, and adds to them then.
"""

from __future__ import annotations

import importlib.abc
import logging
import sys
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

log = logging.getLogger("acmize")

_HEADS = {  # Auto class -> the table of its architectures, both of transformers.models.auto.modeling_auto
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}


@cache
def _config_class() -> type:
    from transformers import PretrainedConfig

    from acmize.hf_models import MODEL_TYPE

    class AdaptiveConfig(PretrainedConfig):
        """What config.json of an adaptive model says; its `base` is the dense model."""

        model_type = MODEL_TYPE

    return AdaptiveConfig


def _load(architectures: frozenset[str], head: str, source: Any, *_: Any, config: Any = None, **options: Any) -> Any:
    """What `from_pretrained` of an Auto class comes to."""
    from acmize.errors import AcmizeError
    from acmize.hub import from_pretrained

    found = config.base["architecture"]
    if found not in architectures:
        raise AcmizeError(f"{source}: found {found}, which {head} does not open; use the Auto class of its kind")
    dtype = options.get("dtype", options.get("torch_dtype"))
    if str(dtype).removeprefix("torch.") not in ("None", "auto", "float32"):
        raise AcmizeError(f"{source}: found dtype {dtype}, expected float32; run it under torch.autocast instead")
    if options.get("device_map") is not None:
        raise AcmizeError(f"{source}: found a device_map, expected none; move the model with .to(device)")
    return from_pretrained(source, revision=options.get("revision"))


def _register_config(auto: Any) -> None:
    config: Any = _config_class()
    auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(auto: Any) -> None:
    config = _config_class()
    for head, table in _HEADS.items():
        load = partial(_load, frozenset(map(str, getattr(auto, table).values())), head)
        opener = type("Adaptive", (), {"config_class": config, "from_pretrained": staticmethod(load)})
        getattr(auto, head).register(config, opener, exist_ok=True)


_AFTER: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


def _run(register: Callable[[Any], None], module: ModuleType) -> None:
    try:
        register(module)
    except Exception as error:  # any kind: an import of transformers must not fail for us
        log.warning("acmize: the Auto classes of transformers will not open adaptive models (%s)", error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; calls what waits for a module behind its import."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """The spec that the other finders give, told to register."""
        register = _AFTER.get(fullname)
        if register is None:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _run(register, module)

            spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def install() -> None:
    """Register now with what is imported, and later with what will be; a second call changes nothing."""
    for name, register in _AFTER.items():
        if name in sys.modules:
            _run(register, sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


__all__ = ["install"]
