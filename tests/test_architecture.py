"""The house rules that a reader should be able to rely on, held by reading the source.

Import order, names, depth, sizes, docstrings, no pickles. Every rule turns a file's syntax tree into a list
of violations, and is tried on planted violations as well as on the package.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lasar"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part imports itself and the parts before it. Whoever adds a part decides here where it stands.
ORDER = (
    "errors", "ranks", "config", "artifacts", "progress", "data", "sid", "prompts", "model", "engine", "decoding",
    "recommender", "cot", "evaluation", "training", "rl", "baselines", "stages", "study", "cli_tables",
    "cli_serving", "cli_studies", "cli",
)  # fmt: skip
# Not in the line: `serving`, `scoring` and the two in a cluster stand on the recommender, never see training code;
# `lasar` opens doors.
BELOW_RECOMMENDER = frozenset(ORDER[: ORDER.index("recommender") + 1])
MAY_IMPORT = {
    **{part: frozenset(ORDER[: index + 1]) for index, part in enumerate(ORDER)},
    "serving": BELOW_RECOMMENDER | {"cot", "serving"},
    "scoring": BELOW_RECOMMENDER | {"scoring"},
    "cluster": BELOW_RECOMMENDER | {"cluster", "scoring", "serving"},
    "lasar": BELOW_RECOMMENDER,
}
MAY_IMPORT["cli_serving"] |= {"cluster", "serving", "scoring"}
# Baselines are peers to compare with: nothing but a stage may depend on one.
for _part in ("study", "cli_tables", "cli_serving", "cli_studies", "cli"):
    MAY_IMPORT[_part] -= {"baselines"}

FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "base", "manager", "managers", "common", "misc"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "torch.save",
}  # fmt: skip
MAX_MODULE_LINES = 400
MAX_STAGE_LINES = 220
MAX_FUNCTION_LINES = 80
MAX_CONFIG_FIELDS = 15


def part_of(path: Path, package: Path = PACKAGE) -> str:
    """The part a file belongs to: `lasar/data/text.py` is data, `lasar/cli.py` is cli."""
    first = path.relative_to(package).parts[0].removesuffix(".py")
    return {"__init__": "lasar", "__main__": "cli"}.get(first, first)


def imported_parts(tree: ast.Module, path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """Every part of lasar that a file imports, anywhere in it, with the line."""
    here = ("lasar", *path.relative_to(package).parent.parts)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            # "from lasar import config" imports a part; "from lasar import __version__" imports none
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "lasar" else [module]
        elif isinstance(node, ast.Call) and dotted_name(node.func).endswith(("import_module", "require")):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            root, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            if root == "lasar" and part and (part in MAY_IMPORT or not part.startswith("__")):
                yield node.lineno, part


def dotted_name(node: ast.expr) -> str:
    """`torch.load` for the expression torch.load; an empty string for anything but names and attributes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return ""


def import_order(path: Path, tree: ast.Module, package: Path = PACKAGE) -> list[str]:
    part = part_of(path, package)
    if part not in MAY_IMPORT:
        return [f"{part!r} has no place in ORDER"]
    return [
        f"line {line}: {part} may not import {imported}"
        for line, imported in imported_parts(tree, path, package)
        if imported not in MAY_IMPORT[part] and not (part == "lasar" and imported not in MAY_IMPORT)
    ]


def names(path: Path, tree: ast.Module, package: Path = PACKAGE) -> list[str]:
    pieces = path.relative_to(package).with_suffix("").parts
    words = {word for piece in pieces for word in piece.lower().split("_")}
    return [f"{word!r} says nothing about what is in the file" for word in sorted(words & FORBIDDEN_NAMES)]


def depth(path: Path, tree: ast.Module, package: Path = PACKAGE) -> list[str]:
    return [] if len(path.relative_to(package).parts) <= 2 else ["deeper than one folder"]


def module_docstring(path: Path, tree: ast.Module, package: Path = PACKAGE) -> list[str]:
    private = path.stem.startswith("_") and not path.stem.startswith("__")
    return [] if private or ast.get_docstring(tree) else ["no module docstring"]


def no_pickle(path: Path, tree: ast.Module, package: Path = PACKAGE) -> list[str]:
    found = []
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            modules = [dotted_name(node.func)]
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                found.append(f"line {node.lineno}: allow_pickle")
        for module in modules:
            if module.partition(".")[0] in FORBIDDEN_IMPORTS or module in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: {module}")
    return found


def sizes(path: Path, tree: ast.Module, package: Path = PACKAGE) -> list[str]:
    found = []
    lines = max((getattr(node, "end_lineno", 0) or 0 for node in tree.body), default=0)
    limit = MAX_STAGE_LINES if part_of(path, package) == "stages" else MAX_MODULE_LINES
    if lines > limit:
        found.append(f"{lines} lines, {limit} are the limit")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{node.name}: {length} lines, {MAX_FUNCTION_LINES} are the limit")
    return found


def stage_configs(path: Path, tree: ast.Module, package: Path = PACKAGE) -> list[str]:
    """A stage file's Config: few fields, each with a docstring under it."""
    found = []
    if part_of(path, package) != "stages":
        return []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != "Config":
            continue
        fields = [(i, child) for i, child in enumerate(node.body) if isinstance(child, ast.AnnAssign)]
        if len(fields) > MAX_CONFIG_FIELDS:
            found.append(f"Config: {len(fields)} fields, {MAX_CONFIG_FIELDS} are the limit")
        for index, child in fields:
            after = node.body[index + 1] if index + 1 < len(node.body) else None
            text = after.value if isinstance(after, ast.Expr) else None
            if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                found.append(f"Config.{ast.unparse(child.target)}: no docstring under it")
    return found


Rule = Callable[[Path, ast.Module, Path], list[str]]
RULES: tuple[Rule, ...] = (import_order, names, depth, module_docstring, no_pickle, sizes, stage_configs)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    broken = {}
    for path in FILES:
        found = rule(path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)), PACKAGE)
        if found:
            broken[path.relative_to(PACKAGE).as_posix()] = found
    assert broken == {}


def test_source_is_ascii() -> None:
    assert [str(path) for path in FILES if not path.read_text(encoding="utf-8").isascii()] == []


def test_there_is_something_to_check() -> None:
    assert {"errors", "config", "artifacts", "stages"} <= {part_of(path) for path in FILES}


# A rule that cannot fail holds nothing: planted violations, and code that only looks like one.

DOC = '"""Doc."""\n'
LONG = "x = 1\n" * 400
LONG_STAGE = "x = 1\n" * 220
LONG_FUNCTION = "def work():\n" + "    print()\n" * 80


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (import_order, "data/text.py", "from lasar.sid.catalog import SidCatalog"),
        (import_order, "data/text.py", "import lasar.sid.catalog"),
        (import_order, "data/text.py", "from lasar import sid"),
        (import_order, "data/text.py", "from ..sid import catalog"),
        (import_order, "data/text.py", "def f():\n    from lasar.stages import prepare"),
        (import_order, "data/text.py", "import importlib\nimportlib.import_module('lasar.sid')"),
        (import_order, "errors.py", "from lasar import config"),
        (import_order, "errors.py", "from . import config"),
        (import_order, "config.py", "if TYPE_CHECKING:\n    from lasar.artifacts import run_stage"),
        (import_order, "recommender.py", "import lasar.evaluation.metrics"),
        (import_order, "training/fit.py", "from lasar.baselines.popularity import Popularity"),
        (import_order, "evaluation/results.py", "from lasar.baselines import popularity"),
        (import_order, "cli.py", "from lasar.baselines import popularity"),
        (import_order, "serving/app.py", "from lasar.training.fit import fit"),
        (import_order, "__init__.py", "from lasar.training.fit import fit"),
        (import_order, "stages/sft.py", "from lasar import cli"),
        (import_order, "stages/sft.py", "from lasar.nowhere import x"),
        (import_order, "nowhere/x.py", ""),
        (names, "data/utils.py", ""),
        (names, "data/text_helpers.py", ""),
        (names, "base.py", ""),
        (names, "manager/x.py", ""),
        (depth, "data/amazon/reviews.py", ""),
        (module_docstring, "data/text.py", "x = 1"),
        (module_docstring, "data/__init__.py", ""),
        (no_pickle, "data/text.py", "import pickle"),
        (no_pickle, "data/text.py", "def f():\n    from joblib import dump"),
        (no_pickle, "data/text.py", "torch.load(path)"),
        (no_pickle, "data/text.py", "from torch import load"),
        (no_pickle, "data/text.py", "eval('1')"),
        (no_pickle, "data/text.py", "numpy.load(path, allow_pickle=True)"),
        (sizes, "data/text.py", LONG),
        (sizes, "stages/sft.py", LONG_STAGE),
        (sizes, "data/text.py", LONG_FUNCTION),
        (stage_configs, "stages/sft.py", "class Config:\n    a: int = 1"),
        (stage_configs, "stages/sft.py", "class Config:\n    a: int = 1\n    b: int = 2\n    'Doc.'"),
        (
            stage_configs,
            "stages/sft.py",
            "class Config:\n" + "".join(f"    a{i}: int\n    'D.'\n" for i in range(16)),
        ),
    ],
)
def test_rule_finds_a_planted_violation(rule: Rule, file: str, source: str, tmp_path: Path) -> None:
    text = source if rule is module_docstring else DOC + source
    assert rule(tmp_path / file, ast.parse(text), tmp_path)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (import_order, "sid/catalog.py", "from lasar.data.interactions import Interactions"),
        (
            import_order,
            "data/text.py",
            "from lasar.data.tables import x\nfrom . import tables\nfrom .tables import y",
        ),
        (import_order, "stages/evaluate.py", "from lasar.baselines import popularity"),
        (import_order, "baselines/ranking.py", "from .popularity import Popularity"),
        (import_order, "cli.py", "from lasar import __version__\nfrom lasar.stages import STAGES"),
        (import_order, "serving/app.py", "from lasar.recommender import Recommender"),
        (import_order, "__init__.py", "def f():\n    from lasar.recommender import Recommender"),
        (import_order, "data/text.py", "import lasartools\nimport numpy"),
        (names, "data/basket.py", ""),
        (names, "database.py", ""),
        (depth, "data/reviews.py", ""),
        (
            no_pickle,
            "model/backbone.py",
            "model.eval()\nsafetensors.torch.load_file(path)\nre.compile('eval(')",
        ),
        (no_pickle, "data/text.py", "numpy.load(path, allow_pickle=False)"),
        (sizes, "data/text.py", LONG_STAGE),
        (sizes, "data/text.py", LONG_FUNCTION.replace("    print()\n", "", 1)),
        (stage_configs, "stages/sft.py", "class Config:\n    a: int = 1\n    'Doc.'"),
        (stage_configs, "sid/kmeans.py", "class Config:\n    a: int = 1"),
    ],
)
def test_rule_accepts_what_is_allowed(rule: Rule, file: str, source: str, tmp_path: Path) -> None:
    assert rule(tmp_path / file, ast.parse(DOC + source), tmp_path) == []
