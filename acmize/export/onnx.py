"""An adaptive model as one ONNX file: inputs `x` (batch, C, H, W) and `budget` (), output `logits`.

What a program needs to feed it lies in the file's metadata (`metadata`): preprocessing, licence, range of budgets, and
what the model reached in evaluation at each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from acmize.__about__ import __version__
from acmize.data import data_config
from acmize.export.trace import budget_range, trace

OPSET = 20
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter writes the module that a node comes from


def write_onnx(model: Any, path: Path) -> None:
    """Write an exportable model as one file."""
    _save(_converted(model), path)


def write_int8(model: Any, path: Path) -> None:
    """Write an exportable model with the products of its layers in 8 bits; gates stay in 32, as they decide.

    Weights are rounded once, for each column of their matrix; inputs when they come ("dynamic quantisation").
    """
    made, whole = _converted(model), path.with_name(f"float-{path.name}")
    gates = gate_products(made)
    _save(made, whole)
    quantise(whole, path, gates)


def gate_products(made: Any) -> list[str]:
    """Names of the nodes of gates in an `onnx_ir.Model` that the exporter made."""
    return [node.name for node in made.graph if ".gate" in node.metadata_props.get(SCOPES, "") and node.name]


def quantise(whole: Path, path: Path, keep: list[str]) -> None:
    """Write the ONNX file `whole` to `path` in 8 bits, but for the nodes to keep; files lie beside `path` meanwhile."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Only a product with a stored matrix is quantised: slices and transposes of weights have to be stored.
    folded = path.with_name(f"folded-{path.name}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.log_severity_level = 3  # it warns of each constant that it leaves doubled
    onnxruntime.InferenceSession(whole, options, disabled_optimizers=["MatMulAddFusion"])  # which makes no MatMul
    proto = onnx.load(folded)
    for graph in _graphs(proto.graph):
        del graph.value_info[:]  # of folded values they are those before folding
    onnx.helper.set_model_props(proto, {**_props(proto), "onnx.quant.pre_process": "onnxruntime.quant"})
    quantize_dynamic(
        proto,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=keep,
        extra_options={"EnableSubgraph": True},
    )


def _graphs(graph: Any) -> list[Any]:
    """A graph and those of the branches in it."""
    found = [graph]
    for one in found:  # grows on the way
        found += [a.g for node in one.node for a in node.attribute if a.HasField("g")]
    return found


def _props(proto: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def metadata(model: Any) -> dict[str, str]:
    """What an exported file says of itself; values that are not plain text are JSON.

    Returns:
        acmize: version. base_model: architecture. license, where it is known. preprocessing: input_size (C, H, W),
        and mean, std, interpolation, crop_pct, crop_mode where the model states them. budget_range: lowest and highest.
        results: rows of what was measured before the export, {"budget", "macs_ratio", "accuracy"}.
    """
    stated = getattr(model, "pretrained_cfg", None)
    keep = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    wanted: dict[str, Any] = {"input_size": model.plan.input_size}
    if stated:
        wanted = {key: value for key, value in data_config(model).items() if key in keep}
    rows = model.results.get("results", ())
    results = [{key: row.get(key) for key in ("budget", "macs_ratio", "accuracy")} for row in rows]
    told = {
        "acmize": __version__,
        "base_model": str(model.base["architecture"]),
        "license": model.base["pretrained_cfg"].get("license"),
        "preprocessing": json.dumps(wanted),
        "budget_range": json.dumps(budget_range(model)),
        "results": json.dumps(results),
    }
    return {key: value for key, value in told.items() if value is not None}


def _converted(model: Any) -> Any:
    """The model as an `onnx_ir.Model`."""
    from acmize.export.onnx_ops import TRANSLATIONS

    program = torch.onnx.export(
        trace(model, fused_attention=False),
        input_names=["x", "budget"],
        output_names=["logits"],
        opset_version=OPSET,
        custom_translation_table=TRANSLATIONS,
        optimize=False,  # ONNX Runtime folds and fuses when it loads; the exporter's own passes take minutes
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata(model))
    return program.model


def _save(made: Any, path: Path) -> None:
    """Write an `onnx_ir.Model` without what the exporter notes at every node: stack traces, ten times the graph."""
    import onnx_ir

    for node in onnx_ir.traversal.RecursiveGraphIterator(made.graph):
        node.metadata_props.clear()
    onnx_ir.save(made, path)
