"""Imports point downward only, and what meets the compiled library stays in ops/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import td3_fast

PACKAGE = Path(td3_fast.ops.__file__).parents[1]
# from the top; a module imports only from layers below its own, or from within its own folder
LAYERS = (
    {"cli"},
    {"cli_distill", "cli_export", "cli_reproduce", "cli_search"},
    {"cli_options"},
    {"cli_data", "cost", "reproduce", "search_run"},
    {"side_by_side"},
    {"own_process", "table_files"},
    {"run"},
    {"evaluate_run", "epochs"},
    {"run_folder", "terminal", "reproduce_page"},
    {"checkpoint", "report"},
    {"faults", "figures", "recipes", "search", "tune"},
    {"memory"},
    {"distill", "pretrain", "evaluate"},
    {"trajectory", "validation"},
    {"objective"},
    {"distill_config", "learner_classes"},
    {"training", "export", "initial", "distill_state"},
    {"unroll", "sampled_softmax", "ensemble"},
    {"summary"},
    {"farzi"},
    {"summary_base"},
    {"summary_file", "distilled_data"},
    {"parallel"},
    {"artefact", "metrics", "learners", "data", "significance"},
    {"checks", "progress", "files", "heap", "live_bytes", "ops", "paper"},
)
DEPTH = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}
# a method of a lower layer that hands over to a higher one, imported when it is called
LATE = {("summary_base", "unroll"), ("distill", "memory")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(room, whether the import stands at the top of the module) of every import of our own."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "td3_fast":
            inside = node.module.split(".")[1:]
            names = inside[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("td3_fast.")]
        for name in names:
            yield name, node in tree.body


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_downward(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "_kernels", "__main__"):
        return
    for name, at_top in imports(path):
        typing_only_or_late = not at_top
        if name == here or (typing_only_or_late and (here, name) in LATE | {("summary_base", "learners")}):
            continue
        assert name in DEPTH, f"{path.name} imports {name}, which has no layer"
        assert DEPTH[name] > DEPTH[here], f"{path.name} imports {name}, which is not below it"


def test_only_ops_says_torch_ops() -> None:
    outside = [path for path in PACKAGE.rglob("*.py") if room(path) != "ops"]
    assert outside
    assert not [path.name for path in outside if "torch.ops.td3_fast" in path.read_text()]
