"""The tree reads as the pipeline does: a module imports from its own stage or an earlier one, never back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Stages in order; a name stands for its module or for everything in its folder.
ORDER = [
    ["errors", "resources"],
    ["locks"],
    ["schema", "config"],
    ["flags"],
    ["weights"],
    ["spool"],
    ["cohorts"],
    ["grouping", "splits"],
    ["shards"],
    ["prepare"],
    ["views", "audit"],
    ["inputs"],
    ["dataset"],
    ["alignment", "distributed", "retrieval", "gradcache"],
    ["objectives"],
    ["encoders"],
    ["checkpoint"],
    ["columns"],
    ["latents"],
    ["presets", "tasks", "fusions"],
    ["adapters"],
    ["packing"],
    ["caches"],
    ["quantisation"],
    ["backbones", "hardware"],
    ["memory"],
    ["reading", "sampling"],
    ["readings"],
    ["linear_readout", "tree_readout"],
    ["interception"],
    ["timelines", "belief_tables"],
    ["trajectory"],
    ["streaming"],
    ["anchoring"],
    ["mitigation"],
    ["scores", "delong"],
    ["gaps"],
    ["metrics"],
    ["summaries", "tabular_models", "calibration"],
    ["subgroups", "baselines", "arms", "selection", "ensemble"],
    ["trackers"],
    ["sequence_objective"],
    ["zero"],
    ["engines", "sharding"],
    ["training"],
    ["static"],
    ["cards"],
    ["assemble"],
    ["hub"],
    ["pretraining", "finetuning"],
    ["sweep"],
    ["interpret"],
    ["compared"],
    ["evidence", "typeset"],
    ["variants"],
    ["pooled_arms"],
    ["pooling"],
    ["report"],
    ["compare", "summary", "inspector", "result_tables"],
    ["grid"],
    ["experiment"],
    ["results"],
    ["export_tables"],
    ["export"],
    ["cli"],
]
STAGE = {name: stage for stage, names in enumerate(ORDER) for name in names}
# Conveniences a user reaches through the model or the package, imported only when called for.
LATE = {("trajlm.trajectory", f"trajlm.{module}") for module in ("assemble", "streaming", "hub")}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "trajlm").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(source: str, known: set[str]) -> set[tuple[str, bool]]:
    """Names of imported modules, and whether the import stands at the top of the module."""
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import module` imports the module; `from package import name` the package.
            names = [name if name in known else str(node.module) for name in inner]
        found |= {(name, id(node) in top) for name in names}
    return found


MODULES = modules()
IMPORTS = {name: imports_of(path.read_text(), set(MODULES)) for name, path in MODULES.items()}


def stage(module: str) -> int:
    name = module.split(".")[1]
    assert name in STAGE, f"trajlm/{name} has no place in ORDER"
    return STAGE[name]


def test_every_module_has_a_place_and_every_place_a_module():
    assert {module.split(".")[1] for module in MODULES if "." in module} == set(STAGE)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "trajlm"])
def test_imports_go_from_later_stages_to_earlier(module):
    for imported, at_top in IMPORTS[module]:
        if imported == "trajlm" or not imported.startswith("trajlm."):
            continue
        if (module, imported) in LATE:
            assert not at_top, f"{module} imports {imported} at its top"
            continue
        own = module.split(".")[1] == imported.split(".")[1]
        assert own or stage(imported) < stage(module), f"{module} imports {imported}, which is no earlier stage"


def test_late_imports_are_still_needed():
    assert all((late, False) in IMPORTS[module] for module, late in LATE)


def test_no_two_modules_import_each_other():
    graph = {m: {i for i, top in IMPORTS[m] if top and i in MODULES} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_cohorts_do_not_know_each_other():
    """Every cohort is a family of files whose names begin alike; they share how tables are read and accounted for."""
    shared = {"ledger", "leaks", "tables"}
    families = {m.split(".")[2].split("_")[0] for m in MODULES if m.startswith("trajlm.cohorts.")} - shared
    assert {"synthetic", "physionet2012", "mimic", "eicu", "meds"} <= families
    for module in (m for m in MODULES if m.startswith("trajlm.cohorts.")):
        own = module.split(".")[2].split("_")[0]
        for imported, _ in IMPORTS[module]:
            if imported.startswith("trajlm.cohorts."):
                assert imported.split(".")[2].split("_")[0] in {own, *shared}, f"{module} imports {imported}"


def test_the_package_imports_no_script():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert {"pretrain", "finetune", "interpret"} <= scripts
    used = {(m, i) for m, found in IMPORTS.items() for i, _ in found if i.split(".")[0] in scripts}
    assert not used


def test_scripts_parse_their_flags_before_they_load_torch():
    heavy = {"torch", "transformers", "peft", "accelerate", "polars", "numpy"}
    light = [f"trajlm.{name}" for name in ("cli", "config", "errors", "flags", "presets", "resources")] + ["trajlm"]
    for name in light:
        assert not {i.split(".")[0] for i, top in IMPORTS[name] if top} & heavy
    for script in ("pretrain.py", "finetune.py", "interpret.py"):
        top = {i for i, at_top in imports_of((ROOT / script).read_text(), set(MODULES)) if at_top}
        assert {i for i in top if i.startswith("trajlm")} <= set(light)
        assert not {i.split(".")[0] for i in top} & heavy


def waited_for(module: str) -> set[str]:
    """Packages loaded before the first line of a module runs: by its own imports, and by theirs."""
    seen, todo = {module}, [module]
    while todo:
        new = {i for i, at_top in IMPORTS.get(todo.pop(), set()) if at_top} - seen
        seen |= new
        todo += new
    return {name.split(".")[0] for name in seen}


def test_commands_over_tables_do_not_wait_for_models():
    assert {"torch", "transformers", "accelerate"} <= waited_for("trajlm.finetuning")
    for module in ("cohorts.synthetic", "prepare", "report.audit", "export", "weights", "presets"):
        assert not waited_for(f"trajlm.{module}") & {"torch", "transformers", "accelerate"}, module
    assert not waited_for("trajlm.compare") & {"transformers", "accelerate"}
    # Seconds that only a model with adapters or with 4-bit weights needs.
    assert not {m for m in MODULES if waited_for(m) & {"peft", "bitsandbytes"}}
