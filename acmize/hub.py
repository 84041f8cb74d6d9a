"""Saving, loading and publishing an adaptive model: safetensors and JSON, nothing else.

A folder holds `config.json` (what to build), `model.safetensors` (large models in shards, see `weights`), `plan.json`
(what to insert, and the calibration), `results.json`, `recipe.json` (the resolved options of the conversion) and a
model card. Loading needs neither data nor network nor the base weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from acmize import __about__, hf_models
from acmize.checkpoint import atomic_dir, write_json
from acmize.errors import AcmizeError
from acmize.hosts_speech import is_speech
from acmize.inputs import Batch, forward
from acmize.insert import convert_
from acmize.methods.token_merging import schedule_of
from acmize.phases.calibrate import Calibration, set_budget
from acmize.plan import Plan
from acmize.recording import record
from acmize.results import Results, latency_table, metric_of, results_table
from acmize.saved import SCHEMA, check_weights, load_state, read_saved
from acmize.untrusted import sketched
from acmize.weights import MAX_SHARD_SIZE, OURS, WEIGHTS, Weights, lean, save_weights, weights_in

FILES = ("config.json", "plan.json")  # and weights, see `weights`
ARCHITECTURE, MODEL_TYPE = "acmize_adaptive", "acmize"  # by which timm and transformers know a saved folder
HERE = "THIS REPOSITORY OR FOLDER"


class Adaptive:
    """Mixed into a converted model's class: it stays what it was and can be given a budget and saved.

    Attributes:
        plan: what was inserted.
        calibration: budget -> position of the dial.
        base: how to build the dense model again, see `base_of`.
        results: measured table, as in `results.json`; prints and plots itself.
        recipe: resolved options of the conversion.
    """

    plan: Plan
    calibration: Calibration
    base: dict[str, Any]
    results: Results
    recipe: dict[str, Any]
    budget: float | None = None

    def extra_repr(self) -> str:
        """The plan in a few words, for `print(model)`."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(e.kind for e in self.plan.entries).items())
        low, high = self.plan.budget_range
        merging = "" if self.plan.merging is None else ", merging tokens"
        stays = f"{len(self.plan.refused)} modules stay dense"
        sites = f"{len(self.plan.entries)} adaptive sites" + (f" ({kinds})" if kinds else "")
        return f"budget={self.budget}\nplan: {sites}{merging}, {stays}; budgets {low:.3f} to {high:.3f}"

    def set_budget(self, budget: float) -> None:
        """Spend this share of the dense model's MACs on average, gates included.

        Raises:
            AcmizeError: below what the plan can reach, or not calibrated.
        """
        self.budget = budget
        set_budget(self, self.plan, self.calibration, budget)  # pyright: ignore[reportArgumentType]

    def with_compute(self, inputs: Batch) -> tuple[Any, Tensor]:
        """Run the model once: its output, and what each sample cost, as a share of the dense model's MACs, (B,)."""
        model: Any = self
        with record(model, len(inputs)) as seen:
            output = forward(model, inputs)
        macs, whole = self.plan.account(seen.executed().double(), seen.tokens, schedule_of(model))
        return output, macs / whole

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE) -> Path:
        """Write the model to a folder (see the module's docstring); an existing one is replaced only when complete.

        Weights of more than `max_shard_size` (bytes, or text such as "300MB") go into several files.
        """
        return save_pretrained(self, folder, max_shard_size=max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> str:
        """Upload to the Hugging Face Hub; returns the commit's address."""
        return push_to_hub(self, repo_id, private=private, token=token, max_shard_size=max_shard_size)


def make_adaptive(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    base: dict[str, Any],
    results: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> Any:
    """Give a converted model `set_budget`, `save_pretrained` and `push_to_hub`; it stays an instance of its class."""
    cls = type(model)
    if not isinstance(model, Adaptive):
        name = cls.__name__ if is_speech(model) else f"Adaptive{cls.__name__}"  # pipelines tell models by this name
        model.__class__ = type(name, (Adaptive, cls), {"__module__": cls.__module__})
    adaptive: Any = model
    adaptive.plan, adaptive.calibration, adaptive.base = plan, calibration, base
    adaptive.results, adaptive.recipe = Results(results or {}), recipe or {}
    return adaptive


def base_of(model: nn.Module, kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """How to build this dense model again: `{"library", "architecture", "kwargs", "pretrained_cfg"}`.

    A module that timm does not know is recorded by its class's name alone and has to be handed to `from_pretrained`.
    """
    if is_speech(model):
        return hf_models.base_of(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if name is None:
        return {"library": "module", "architecture": type(model).__name__, "kwargs": {}, "pretrained_cfg": {}}
    built = dict(kwargs or {})
    embed = getattr(model, "patch_embed", None)
    size, wanted = getattr(embed, "img_size", None), cfg.get("input_size", (3,))
    if size is not None and tuple(size) != tuple(wanted[1:]):
        built.setdefault("img_size", list(size))
    channels = getattr(getattr(embed, "proj", None), "in_channels", wanted[0])
    if channels != wanted[0]:
        built.setdefault("in_chans", channels)
    classes = getattr(model, "num_classes", cfg.get("num_classes"))
    if classes is not None:
        built.setdefault("num_classes", classes)
    keep = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "tag", "license")
    return {
        "library": "timm",
        "architecture": name,
        "kwargs": built,
        "pretrained_cfg": {k: cfg[k] for k in keep if cfg.get(k) is not None},
    }


# --- saving ---------------------------------------------------------------------------------------------------


def save_pretrained(
    model: Any, folder: str | Path, repo_id: str = HERE, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> Path:
    """See `Adaptive.save_pretrained`; `repo_id` is what the model card calls the model by."""
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_dir(folder) as new:
        config = {"schema": SCHEMA, "acmize": __about__.__version__, "budget": model.budget, "base": model.base}
        write_json(new / "config.json", {**config, **_for_others(model.base)})
        plan = {"plan": model.plan.to_dict(), "calibration": model.calibration.to_dict()}
        write_json(new / "plan.json", plan)
        write_json(new / "results.json", model.results)
        write_json(new / "recipe.json", model.recipe)
        save_weights(new, model.state_dict(), max_shard_size)
        (new / "README.md").write_text(model_card(model, repo_id), encoding="utf-8")
        if (processor := getattr(model, "processor", None)) is not None:
            processor.save(new)
        if (generation := getattr(model, "generation_config", None)) is not None:
            generation.save_pretrained(new)
        kept = {path.name for path in new.iterdir()}
        for other in sorted(folder.iterdir()) if folder.is_dir() else ():
            if other.name not in kept and not OURS.fullmatch(other.name):
                copy = shutil.copytree if other.is_dir() else shutil.copy2  # a .git, a report: not ours to throw away
                copy(other, new / other.name)
    return folder


def _for_others(base: dict[str, Any]) -> dict[str, Any]:
    """What timm and transformers read of a config.json, where they can load the model; acmize reads its base."""
    if base["library"] == "transformers":
        return {"model_type": MODEL_TYPE}
    if base["library"] != "timm":
        return {}
    cfg = {key: value for key, value in base["pretrained_cfg"].items() if key not in ("tag", "license")}
    classes = base["kwargs"].get("num_classes", cfg.get("num_classes"))
    known = {} if classes is None else {"num_classes": classes}
    return {"architecture": ARCHITECTURE, "model_type": MODEL_TYPE, **known, "pretrained_cfg": cfg}


def check_replaceable(folder: str | Path) -> None:
    """Raise unless a model can be saved there: saving replaces the whole folder.

    Raises:
        AcmizeError: a file, the current folder, or a folder with anything but a saved model in it.
    """
    folder = Path(folder).absolute()
    if folder.is_dir() and folder.samefile(Path.cwd()):
        raise AcmizeError(f"output {folder}: is the current folder, which would be replaced; name a new one")
    if folder.exists() and not folder.is_dir():
        raise AcmizeError(f"output {folder}: is a file, expected a folder; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and _lacking(folder) is not None:
        raise AcmizeError(f"output {folder}: exists and is not a saved acmize model; choose another folder")
    parent = next(p for p in folder.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AcmizeError(f"output {folder}: {parent} is no folder that can be written to; choose another one")


def model_card(model: Any, repo_id: str = HERE) -> str:
    """A Hugging Face model card with the measured table and how to load the model."""
    name = model.base["architecture"]
    made = f"{name} made adaptive with acmize {__about__.__version__}"
    text = ["---", card_data(model), "---", "", f"# {name}, adaptive", ""]
    text += [f"{made}: every input runs only the part of it that it needs.", ""]
    text += ["```python", "import acmize", "", f'model = acmize.from_pretrained("{repo_id}")']
    text += ["model.set_budget(0.6)", "```", ""]
    if model.results.get("results"):
        text += [*results_table(model.results), ""]
        data, seed = _data_name(model), model.recipe.get("seed", "?")
        text += [f"Measured on {model.results.get('samples', '?')} test samples of `{data}`, seed {seed}.", ""]
    if "latency" in model.results:
        text += [*latency_table(model.results["latency"]), ""]
    text += ["Budget: mean executed MACs of the whole model, gates included, over the dense model's MACs.", ""]
    return "\n".join(text)


def card_data(model: Any) -> str:
    """The metadata of a model card, with the measured results in the schema of the Hub, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    base, results, data = model.base, model.results, _data_name(model)
    of_timm, cfg = base["library"] == "timm", base["pretrained_cfg"]
    task = "automatic-speech-recognition" if base["library"] == "transformers" else "image-classification"
    metric, _ = metric_of(results)
    rows = [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            dataset_split=results.get("split"),
            metric_type=metric,
            metric_value=round(row[metric], 4),
            metric_name=f"{metric} at budget {row['budget']:g} ({row['macs_ratio']:.3f} of the dense MACs)",
        )
        for row in results.get("results", [])
        if row.get(metric) is not None
    ]
    made = ModelCardData(
        library_name="acmize",
        tags=["acmize", "adaptive-computation"],
        pipeline_tag=task,
        license=cfg.get("license"),
        base_model=f"timm/{base['architecture']}{'.' + cfg['tag'] if cfg.get('tag') else ''}" if of_timm else None,
        datasets=[data] if data.count("/") == 1 else None,  # only a repository has a page to point at
        model_name=f"{base['architecture']}, adaptive",
        eval_results=rows or None,
    )
    return made.to_yaml().strip()


def _data_name(model: Any) -> str:
    """What the data are called: a repository's id as it is, a folder by its name alone."""
    given = str(model.recipe.get("data") or "unnamed")
    return given if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given) and not Path(given).exists() else Path(given).name


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> str:
    """See `Adaptive.push_to_hub`.

    All files go into one commit: an upload that is interrupted publishes nothing, and can be repeated. Weights of an
    earlier commit that have other names, since they are in more or fewer files, are taken out in the same one.

    Raises:
        AcmizeError: no access, no network, a name that the Hub refuses.
    """
    import tempfile

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_pretrained(model, Path(folder) / "model", repo_id, max_shard_size=max_shard_size)
        files = [CommitOperationAdd(path.name, path) for path in sorted(saved.iterdir())]
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            there = {name for name in api.list_repo_files(repo_id) if OURS.fullmatch(name)}
            stale = [CommitOperationDelete(name) for name in sorted(there - {file.path_in_repo for file in files})]
            # Not upload_folder: it may split a folder into several commits, and stop between two of them.
            made = api.create_commit(repo_id, [*files, *stale], commit_message=f"acmize {__about__.__version__}")
        except Exception as error:  # any kind: of the client, of its HTTP library, of its threads
            raise AcmizeError(
                f"{repo_id}: cannot be uploaded ({_first_line(error)}); nothing was published. Check the name, the "
                "network and the token (hf auth login, or HF_TOKEN), and repeat"
            ) from error
    return str(made)


def _first_line(error: BaseException) -> str:
    """What an error says, and what the first of those behind it says."""
    first, root = error, error
    while root.__cause__ is not None:
        root = root.__cause__
    told = [(str(e).strip().splitlines() or [type(e).__name__])[0] for e in (first, root)]
    return ": ".join(dict.fromkeys(told))


# --- loading --------------------------------------------------------------------------------------------------


def from_pretrained(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """An adaptive model from a folder or a Hub repository, in eval mode, at the budget it was saved with.

    Args:
        source: folder written by `save_pretrained`, or a repository id.
        model: the dense module, freshly built, where timm cannot build it; its weights are replaced.
        revision: branch, tag or commit of the repository.
        token: for a private or gated repository; by default the one that is logged in, or HF_TOKEN.

    Raises:
        AcmizeError: a file is missing, damaged or tampered with, or the weights do not fit the plan.
    """
    folder = _local(source, revision, token)
    saved = read_saved(folder)
    weights = Weights.open(weights_in(folder) or folder / WEIGHTS)

    def built() -> nn.Module:
        return _insert(build_base(saved.base) if model is None else model, saved.plan, folder)

    def loaded() -> nn.Module:
        return load_state(built(), weights)

    if model is None:
        check_weights(sketched(built, weights.shapes), weights)  # before any memory is taken
        dense = lean(loaded)
    else:
        dense = loaded()
    made = make_adaptive(dense, saved.plan, saved.calibration, saved.base, saved.results, saved.recipe).eval()
    if saved.base["library"] == "transformers" and model is None:
        hf_models.attach_processor(made, folder)
        hf_models.attach_generation(made, folder)
    if saved.budget is not None:
        made.set_budget(saved.budget)
    return made


def build_base(base: dict[str, Any]) -> nn.Module:
    """The dense model with random weights, without network.

    Raises:
        AcmizeError: a library or architecture that cannot be built here.
    """
    if base.get("library") == "transformers":
        return hf_models.build(base)
    if base.get("library") != "timm":
        raise AcmizeError(
            f"base model {base.get('architecture')!r} is not of timm; build it and pass from_pretrained(..., model=...)"
        )
    import timm

    import acmize.cifar_models
    import acmize.quickstart_model  # noqa: F401 - both register models of this package

    if not timm.is_model(base["architecture"]):
        raise AcmizeError(
            f"base model {base['architecture']!r} is unknown to timm {timm.__version__}; install a newer timm, or pass "
            "it freshly built: from_pretrained(..., model=...)"
        )
    try:
        return timm.create_model(
            str(base["architecture"]),
            pretrained=False,
            pretrained_cfg_overlay=_tuples(base["pretrained_cfg"]),
            **base["kwargs"],
        )
    except Exception as error:  # any kind: the arguments come from a file
        raise AcmizeError(
            f"base model {base.get('architecture')!r} cannot be built by timm {timm.__version__} ({error!r}); "
            "restore config.json, or install the timm it was saved with"
        ) from None


def _tuples(cfg: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}


def _local(source: str | Path, revision: str | None, token: str | None) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
            raise AcmizeError(
                f"{source}: no such folder; give a folder written by acmize or a Hub repository USER/NAME"
            )
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", "model*.safetensors"]
            found = snapshot_download(str(source), revision=revision, allow_patterns=patterns, token=token)
        except Exception as error:  # any kind: of the client, of its HTTP library, of its threads
            raise AcmizeError(
                f"{source}: neither a folder here nor to be had from the Hub ({_first_line(error)}); check the name, "
                "the revision, the network and the token"
            ) from None
        folder = Path(found)
    if (name := _lacking(folder)) is not None:
        raise AcmizeError(f"{folder}: {name} is missing; expected a folder written by acmize save_pretrained")
    return folder


def _lacking(folder: Path) -> str | None:
    """A file without which a folder is no saved model; None where there are all."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    return next(iter(missing), None if weights_in(folder) else WEIGHTS)


def _insert(model: nn.Module, plan: Plan, folder: Path) -> nn.Module:
    try:
        return convert_(model, plan)
    except AcmizeError:
        raise
    except Exception as error:  # any kind: the sizes come from a file
        raise AcmizeError(f"{folder}/plan.json: does not fit the model ({error!r}); restore the file") from None


__all__ = ["Adaptive", "base_of", "build_base", "from_pretrained", "make_adaptive", "push_to_hub", "save_pretrained"]
