"""The house by its floors: no circle, no import that runs upward, and how large it may be."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dinv"
FLOORS = (  # a room imports rooms of lower floors only; a folder that is named here is one room
    "checks files figures precision pyramid",
    "exercises group models",
    "preflight",
    "compiling data feature_statistics latency pruning_graph",
    "muon objectives",
    "training",
    "continual metrics pruning step",
    "inversion",
    "pool widgets",
    "distillation",
    "generator",
    "experiments.device experiments.overrides experiments.paper",
    "experiments.processes experiments.settings",
    "experiments.profiles",
    "experiments.cache",
    "experiments.results experiments.stages experiments.pruning",
    "experiments.continual experiments.imagenet experiments.notebook experiments.scaling experiments.table1",
    "reproduce",
)
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
FILES = {name.removesuffix(".__init__"): path for name, path in sorted(FILES.items())}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name: str) -> set[str]:
    """The modules of this package that a module imports, at its top or anywhere else."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are written with the package's name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    assert not any(word.partition(".")[0] in ("notebooks", "tests", "benchmarks", "tools") for word in found)
    return {word.removeprefix("dinv.") for word in found if word.startswith("dinv.")} & set(FILES) - {name}


def test_no_module_imports_in_a_circle_or_upward():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    modules = set(FILES) - {"__init__", "experiments"}  # the front door, and a folder's name
    rooms = {name: name if name in floor else name.partition(".")[0] for name in modules}
    assert set(rooms.values()) == set(floor), "FLOORS names every room, and no other"
    for name in modules:
        for other in imports(name) & modules:
            same, below = rooms[other] == rooms[name], floor[rooms[other]] < floor[rooms[name]]
            assert same or below, f"{name} imports {other}, which is not on a lower floor"
    TopologicalSorter({name: imports(name) for name in FILES}).prepare()  # CycleError inside a room
    assert not [name for name, path in FILES.items() if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]


def test_the_package_is_small():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: count for name, count in lines.items() if count > 350}
    assert sum(lines.values()) <= 9175
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    functions = [(node.name, node.args) for node in nodes if isinstance(node, ast.FunctionDef)]
    lists = [(name, [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]) for name, a in functions]
    many = [name for name, words in lists if len(set(words) - {"self", "cls"}) > 8]
    assert len(many) <= 4, many


def test_what_takes_seconds_to_import_waits_until_it_is_needed():
    names = "{'torchvision', 'torch._dynamo', 'timm'}"
    program = f"import sys, dinv.reproduce; print({names} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "set()", run.stdout + run.stderr
