"""Imports run downward only, and `import acmize` is quick and quiet."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "acmize"

# Lowest first. Modules of one row may import each other as long as no circle arises; each row may import
# the rows before it. A package (methods, phases, kernels) stands for all its modules.
ORDER = (
    ("__about__", "errors", "environment", "interrupt", "launched", "after"),
    ("parallel",),
    ("registry",),
    ("kernels", "products"),
    ("inputs", "padding"),
    # cost counts the work of any module and knows nothing of ours
    ("ops", "cost", "convs", "cut", "chain_runs", "importance", "kept", "merge_pairs", "samples", "timing"),
    ("decision",),
    ("gates",),
    ("recording",),
    ("layers", "fusion", "traced"),
    ("adaptive", "channels", "branches", "windows"),
    ("methods",),
    ("plan",),
    ("hosts_speech",),
    ("hosts",),
    ("insert",),
    ("init", "compensate"),
    ("damage", "losses", "diagnose", "controls", "site_times"),
    ("removal",),
    ("checkpoint", "faults", "untrusted", "weights", "unreadable", "batches", "splits", "data", "audio"),
    ("quickstart_model", "hf_models", "cifar_models", "models"),
    ("phases",),
    ("recipe",),
    ("streaming", "images", "speech", "speech_training"),
    ("evaluate", "evaluate_speech", "saved"),
    ("results",),
    ("hub", "timm_entry", "hf_entry"),
    ("conversion",),
    ("stages",),
    ("api",),
    ("bench", "bench_ops", "bench_speech", "verify", "serve", "latency"),
    ("quickstart",),
    ("compare", "reproduce"),
    ("export", "report"),
    ("console",),
    ("tables",),
    ("cli_saved",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, row in enumerate(ORDER) for name in row}
# Slow to import, or an optional extra: wanted only inside the functions that need them.
LATE = (
    "datasets",
    "transformers",
    "soundfile",
    "soxr",
    "jiwer",
    "torchaudio",
    "sklearn",
    "matplotlib",
    "onnx",
    "typer",
    "triton.compiler",
)


def module_name(file: Path, package: Path = PACKAGE) -> str:
    """'methods.acm' for acmize/methods/acm.py, 'methods' for acmize/methods/__init__.py."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, names: set[str]) -> set[str]:
    """Modules of acmize that a source imports anywhere in it; '' stands for acmize/__init__.py itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full = {alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            full = {f"{node.module}.{alias.name}": f"{node.module}" for alias in node.names}
        else:
            continue
        for name, module in full.items():
            if name.split(".")[0] == "acmize":  # from acmize.gates import Decision -> gates
                inner = name.partition(".")[2]
                found.add(inner if inner in names else module.partition(".")[2])
    return found


def violations(graph: dict[str, set[str]]) -> list[str]:
    """What breaks the order, in words; `graph` maps each module to what it imports."""
    wrong = []
    for name, imported in graph.items():
        if not name:
            continue  # acmize/__init__.py may import all
        top = name.split(".")[0]
        if top not in LEVEL:
            wrong.append(f"{name}: unknown; give it a place in ORDER")
            continue
        for other in imported - {name}:
            other_top = other.split(".")[0]
            private = other.rsplit(".", 1)[-1].startswith("_")  # a package's shared helper is no method
            if not other:
                if top not in ("cli", "__main__"):
                    wrong.append(f"{name} imports acmize itself")
            elif other_top not in LEVEL or LEVEL[other_top] > LEVEL[top]:
                wrong.append(f"{name} imports {other}, which stands above it")
            elif top == other_top == "methods" and name != "methods" and not private:
                wrong.append(f"{name} imports {other}: methods do not import each other")
    return wrong


def package_graph() -> dict[str, set[str]]:
    files = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
    return {name: imports_of(file.read_text(encoding="utf-8"), set(files)) for name, file in files.items()}


def test_imports_run_downward() -> None:
    graph = package_graph()
    assert len(graph) > 3
    assert not violations(graph), "\n".join(violations(graph))


def test_imports_have_no_circle() -> None:
    inner = {name: {other for other in found if other and other != name} for name, found in package_graph().items()}
    inner.pop("", None)
    # A package's __init__ is imported with each of its modules: that is no circle by itself.
    pruned = {name: {o for o in found if not name.startswith(f"{o}.")} for name, found in inner.items()}
    TopologicalSorter(pruned).prepare()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "gates",
            "from acmize.phases.distill import distill",
            "gates imports phases.distill, which stands above",
        ),
        (
            "methods.lag",
            "def f():\n    from acmize import hosts",
            "methods.lag imports hosts, which stands above",
        ),
        ("methods.lag", "import acmize.methods.acm", "methods do not import each other"),
        ("plan", "from acmize import convert_model", "plan imports acmize itself"),
        ("surprise", "import acmize.gates", "give it a place"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str, message: str) -> None:
    known = {"gates", "hosts", "plan", "phases.distill", "methods.acm", "methods.lag", ""}
    assert message in "\n".join(violations({name: imports_of(source, known)}))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli", "import acmize\nfrom acmize import hosts"),
        ("methods", "from acmize.methods import acm, lag"),
        ("methods.acm", "from acmize.methods._shared import fold\nfrom acmize.recording import record"),
        ("quickstart", "from acmize.quickstart_model import digits"),
    ],
)
def test_a_right_import_passes(name: str, source: str) -> None:
    known = {"recording", "hosts", "methods.acm", "methods.lag", "methods._shared", "quickstart_model", ""}
    assert violations({name: imports_of(source, known)}) == []


def test_what_is_imported_late_is_what_type_checkers_see() -> None:
    import acmize

    block = next(node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == acmize._LAZY
    assert set(seen) < set(acmize.__all__)
    for name in acmize.__all__:
        assert getattr(acmize, name)


def test_import_is_quick_and_needs_no_network() -> None:
    script = f"""
import socket, sys, time
def refuse(*args, **kwargs):
    raise AssertionError("import acmize opened a connection")
socket.socket.connect = socket.getaddrinfo = refuse
import timm, torch  # what acmize cannot do without; their own time and imports are not ours
before = set(sys.modules)
start = time.perf_counter()
import acmize
print(time.perf_counter() - start)
print(*[name for name in {LATE!r} if name in set(sys.modules) - before])
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    seconds, late = done.stdout.split("\n")[:2]
    assert late == "", f"import acmize also imports: {late}"
    assert float(seconds) < 5  # 0.3 s where this was written; the margin is for a busy machine
