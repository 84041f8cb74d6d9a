"""Sites of a model: those of known classes, those that the user declares, and why a layer is none."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from acmize import hosts_speech, windows
from acmize.errors import AcmizeError
from acmize.hosts import timm_cnns, timm_transformers  # noqa: F401 - they register their handlers
from acmize.hosts._registry import HANDLERS, LINEAR, Found, Handler
from acmize.padding import class_path
from acmize.plan import Refusal, Site

# Layers that a method for these kinds accounts for one by one: in a site, or refused by name.
_COUNTED: dict[str, type[nn.Module]] = {"linear": nn.Linear, "channels": nn.Conv2d}


def find_sites(model: nn.Module, kinds: Sequence[str] = LINEAR) -> Found:
    """Every site of these kinds in known classes, and a refusal for every other layer that such a site is made of.

    Shapes are not looked at; nothing is changed.
    """
    found: Found = []
    inside: set[str] = set()
    for fqn, module in model.named_modules():
        known = _handlers(module)
        handler = next((known[kind] for kind in kinds if kind in known), None)
        if "linear" in kinds:
            found += hosts_speech.front_sites(fqn, module)
        if handler is not None and not any(fqn.startswith(p + ".") for p in inside):
            found += handler(fqn, module)
            inside.add(fqn)
    taken = {path for item in found if isinstance(item, Site) for path in item.roles.values()}
    return found + _rest(model, inside | taken, kinds)


def _handlers(module: nn.Module) -> dict[str, Handler]:
    """Kind of site -> what finds it, for a module's exact class."""
    speech = hosts_speech.HANDLERS.get(class_path(module))
    return HANDLERS.get(type(module), {} if speech is None else dict.fromkeys(LINEAR, speech))


def _rest(model: nn.Module, inside: set[str], kinds: Sequence[str]) -> list[Refusal]:
    """A refusal for every counted layer that is not one of these modules, nor within one."""
    refused = []
    counted = tuple(cls for kind, cls in _COUNTED.items() if kind in kinds)
    for fqn, module in model.named_modules():
        if isinstance(module, counted) and not any(within(fqn, path) for path in inside):
            parent = type(model.get_submodule(fqn.rpartition(".")[0])).__name__
            what = "a linear layer" if isinstance(module, nn.Linear) else "a convolution"
            reason = f"{what} of {parent}, which is not known; name it with --target-modules to convert it"
            refused.append(Refusal(fqn=fqn, reason=reason))
    return refused


def within(fqn: str, path: str) -> bool:
    """Whether a path is another one or lies inside it."""
    return fqn == path or fqn.startswith(f"{path}.")


_CALL = re.compile(r"^(?P<path>[^:]+):(?P<kind>mlp|attention|linear|block)(?:\((?P<args>[^)]*)\))?$")


def parse_targets(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[Site]]:
    """Split `--target-modules` into globs over known sites and declared sites of a user's module.

    A declared site is `PATH:mlp(fc1,fc2)`, `PATH:attention(q,k,v,out,heads=H)`, `PATH:linear` or `PATH:block`, where
    PATH is a glob over module paths and the names are the children's. `PATH:block(branch=NAME,rest=NAME)` names the
    child that gives F(x) and the one that a skipped input passes through (see `Site.block`). Anything else is a glob
    that selects among known sites.

    Raises:
        AcmizeError: a declaration that matches nothing or misses an argument.
    """
    globs, sites = [], []
    names = [name for name, _ in model.named_modules() if name]
    for target in targets:
        match = _CALL.match(target)
        if match is None:
            globs.append(target)
            continue
        paths = fnmatch.filter(names, match["path"])
        args = [a.strip() for a in (match["args"] or "").split(",") if a.strip()]
        words = [a for a in args if "=" not in a]
        options = dict(a.split("=", 1) for a in args if "=" in a)
        made = [_declared(path, match["kind"], words, options, set(names), target) for path in paths]
        sites += [site for site in made if site is not None]
        if not any(made):
            raise AcmizeError(f"--target-modules {target}: no module of this model matches; see its named_modules()")
    return globs, sites


def _declared(
    path: str, kind: str, words: list[str], options: dict[str, str], names: set[str], target: str
) -> Site | None:
    children = [f"{path}.{word}" for word in words]
    if any(child not in names for child in children):
        return None  # a glob such as blocks.* also matches blocks.0.norm
    if kind == "linear":
        return Site.linear(path)
    if kind == "block":
        inner = {role: f"{path}.{name}" for role, name in options.items()}
        if words or not set(inner) <= {"branch", "rest"}:
            raise AcmizeError(f"--target-modules {target}: expected PATH:block or PATH:block(branch=NAME,rest=NAME)")
        return Site.block(path, **inner) if set(inner.values()) <= names else None
    need = {"mlp": 2, "attention": 4}[kind]
    if len(children) != need or (kind == "attention" and not options.get("heads", "").isdigit()):
        form = {"mlp": "PATH:mlp(fc1,fc2)", "attention": "PATH:attention(q,k,v,out,heads=H)"}[kind]
        raise AcmizeError(f"--target-modules {target}: expected {form}")
    if kind == "mlp":
        return Site.mlp(*children)
    q, k, v, out = children
    flags = {name: options.get(name, "true").lower() != "false" for name in ("rotate_qk", "rotate_vo")}
    return Site.attention(q=q, k=k, v=v, out=out, heads=int(options["heads"]), **flags)


def sites_of(model: nn.Module, declared: list[Site], known_too: bool, kinds: Sequence[str]) -> Found:
    """Declared sites, and known ones beside them where globs ask for some; else the rest is refused."""
    if not declared:
        return find_sites(model, kinds)
    taken = {path for site in declared for path in site.roles.values()}
    if not known_too:
        return [*declared, *_rest(model, taken, kinds)]
    rest: Found = []
    for item in find_sites(model, kinds):
        paths = {*item.roles.values()} if isinstance(item, Site) else {item.fqn}
        hit = sorted(path for path in paths if any(within(path, t) or within(t, path) for t in taken))
        if not hit:
            rest.append(item)
        elif isinstance(item, Site):
            reason = f"{hit[0]} is declared by --target-modules"
            rest += [
                Refusal(fqn=p, reason=reason) for p in sorted(paths - taken) if type(model.get_submodule(p)) in _PLAIN
            ]
    return [*declared, *rest]


_PLAIN = (nn.Linear, nn.Conv2d)


def check_declared(model: nn.Module, modules: dict[str, Any], declared: list[Site]) -> None:
    """Raise for a declared site that cannot be one: the user wrote it and can mend it."""
    seen: dict[str, Site] = {}
    for site in declared:
        for role, fqn in site.roles.items():
            if fqn not in modules:
                raise AcmizeError(f"site {site.fqn}: {role}={fqn!r} is not a module of this model; see named_modules()")
            if fqn in seen:
                raise AcmizeError(f"site {site.fqn}: {role}={fqn!r} is declared twice; each layer has one site")
        if reason := unfit(site, modules):
            raise AcmizeError(f"site {site.fqn}: {reason}")
        seen |= dict.fromkeys(site.roles.values(), site)


def unfit(site: Site, modules: dict[str, Any]) -> str | None:
    """Why the layers of a site do not fit together, or None."""
    sizes: dict[str, tuple[int, int]] = {}
    if site.kind == "channels":
        return _unfit_chain(site, modules)
    if site.kind not in LINEAR:
        return None  # its method looks at it
    for role, fqn in site.roles.items():
        layer = modules[fqn]
        if role == "act":
            if any(p.numel() > 1 for p in layer.parameters()):
                return f"its activation {type(layer).__name__} has a parameter for each unit"
        elif role == "module" and type(layer) is nn.Conv1d:
            if reason := windows.unfit(layer):
                return reason
        elif role != "module" or site.kind == "linear":
            pointwise = type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1
            if type(layer) is not nn.Linear and not (pointwise and site.options.get("channels_first")):
                return f"{role}={fqn!r} is a {type(layer).__name__}, expected nn.Linear"
            sizes[role] = (layer.weight.shape[0], layer.weight.shape[1])
    if site.kind == "mlp":
        units = sizes["fc1"][0] // (2 if site.options.get("packed") else 1)
        if sizes["fc2"][1] != units:
            return (
                f"fc2={site.roles['fc2']!r} takes {sizes['fc2'][1]} units, but fc1={site.roles['fc1']!r} gives {units}"
            )
    elif site.kind == "attention":
        heads, width = site.options["heads"], sizes["out"][1]
        given = {"qkv": sizes["qkv"][0] / 3} if "qkv" in sizes else {k: sizes[k][0] for k in "qkv"}
        if heads < 1 or width % heads or any(size != width for size in given.values()):
            return (
                f"heads={heads}, widths {given}: expected {width} each, as out takes, and a whole number for each head"
            )
    return None


def _unfit_chain(site: Site, modules: dict[str, Any]) -> str | None:
    """Why the layers of a chain cannot run on leading slices of their channels, or None."""
    paths, between = list(site.roles.values()), site.options["between"]
    if len(paths) < 2 or len(between) != len(paths) - 1:
        return f"{len(paths)} layers with {len(between)} groups between them: expected two or more, and one fewer"
    for i, path in enumerate(paths):
        layer = modules[path]
        if type(layer) not in (nn.Conv2d, Conv2dSame, nn.Linear):
            return f"{path!r} is a {type(layer).__name__}, expected a plain convolution or linear layer"
        if reason := _uncut(layer, 0 < i < len(paths) - 1):
            return f"{path.rpartition('.')[2]}: {reason}"
        given = modules[paths[i - 1]].weight.shape[0]
        taken = layer.weight.shape[1] * (1 if isinstance(layer, nn.Linear) else layer.groups)
        if i and given != taken:
            return f"{path!r} takes {taken} channels, but {paths[i - 1]!r} gives {given}"
    for path in (p for group in between for p in group):
        if path not in modules:
            return f"{path!r} is not a module of this model"
        if not _channel_wise(modules[path]):
            name = path.rpartition(".")[2]
            return f"a {type(modules[path]).__name__} ({name}) stands among its convolutions and reads every channel"
    return None


def _uncut(layer: Any, inner: bool) -> str | None:
    """Why a layer cannot run on leading slices of its channels, or None; `inner` ones may be depthwise."""
    if isinstance(layer, nn.Linear):
        return None
    if layer.groups == 1:
        strange = layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        return f"padding {layer.padding!r}, {layer.padding_mode}" if strange else None
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    return None if depthwise and inner else f"a convolution of {layer.groups} groups"


def _channel_wise(part: nn.Module) -> bool:
    """Whether a module acts on each channel by itself, so that it can run on some of them: tried out."""
    if type(part) in (nn.BatchNorm2d, BatchNormAct2d):
        return part.running_mean is not None
    if any(True for _ in part.parameters()) or any(True for _ in part.buffers()):
        return False
    x, training = torch.linspace(-3, 3, 4 * 36).view(1, 4, 6, 6), part.training
    try:
        return torch.equal(part.eval()(x.clone())[:, :2], part(x[:, :2].clone()))
    finally:
        part.train(training)
