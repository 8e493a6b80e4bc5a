"""What a notebook's code reaches, through every way that Python has to import a name."""

import subprocess
import sys
import textwrap

import pytest

from mlnb.notebooks.fingerprint import Library, closure, fingerprint_of
from mlnb.notebooks.static_analysis import normalised
from mlnb.project.errors import NotebookError


@pytest.fixture
def project(tmp_path):
    "A function that writes modules of the package `planes` and returns the project's folder"

    def write(**modules):
        package = tmp_path / "planes"
        for name, source in {"__init__": "", **modules}.items():
            file = package.joinpath(*name.split("__", 1) if "__" in name.strip("_") else [name]).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(textwrap.dedent(source))
        return tmp_path

    return write


def dependencies(code, root):
    return set(closure(textwrap.dedent(code), ["planes"], root))


BASE = """
    LIMIT = 3

    def inner(x):
        return x + LIMIT

    def outer(x):
        return inner(x)

    def alone(x):
        return x
"""
OUTER = {"planes.work.outer", "planes.work.inner", "planes.work.LIMIT"}


@pytest.mark.parametrize(
    "code",
    [
        "from planes.work import outer\nouter(1)",
        "from planes.work import outer as o\no(1)",
        "import planes.work\nplanes.work.outer(1)",
        "import planes.work as w\nw.outer(1)",
        "from planes import work\nwork.outer(1)",
        "from planes import work as w\nw.outer(1)",
        "from planes.work import *\nouter(1)",
        "def local():\n    from planes.work import outer\n    return outer(1)",
        "import importlib\nf = 'planes.work.outer'",
        "if True:\n    from planes.work import outer\nouter(1)",
        "try:\n    from planes.work import outer\nexcept ImportError:\n    outer = None\nouter(1)",
    ],
)
def test_ways_to_import(project, code):
    assert dependencies(code, project(work=BASE)) == OUTER


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("from .work import outer\ndef f(x): return outer(x)", {"planes.other.f", *OUTER}),
        ("from . import work\ndef f(x): return work.outer(x)", {"planes.other.f", *OUTER}),
        ("from .work import *\ndef f(x): return outer(x)", {"planes.other.f", *OUTER}),
        ("from .work import outer as f", OUTER),
        ("import planes.work as w\ndef f(x): return w.outer(x)", {"planes.other.f", *OUTER}),
        ("def f(x):\n    from .work import outer\n    return outer(x)", {"planes.other.f", *OUTER}),
        ("from .work import outer\n@outer\ndef f(x): return x", {"planes.other.f", "planes.other.outer", *OUTER}),
        ("from .work import outer\ndef f(x=outer(1)): return x", {"planes.other.f", *OUTER}),
        ("from . import work\nclass f(work.outer): pass", {"planes.other.f", *OUTER}),
        ("from .work import outer\nclass f:\n    def go(self): return outer(1)", {"planes.other.f", *OUTER}),
        ("from .work import outer\nf = lambda x: outer(x)", {"planes.other.f", *OUTER}),
    ],
)
def test_ways_to_use(project, module, names):
    assert dependencies("from planes.other import f\nf(1)", project(work=BASE, other=module)) == names


def test_re_export_by_the_package(project):
    root = project(work=BASE, __init__="from .work import outer\n")
    assert dependencies("from planes import outer\nouter(1)", root) == OUTER
    assert dependencies("import planes\nplanes.outer(1)", root) == OUTER


def test_relative_import_from_a_sub_package(project):
    root = project(work=BASE, deep__leaf="from ..work import outer\ndef f(x): return outer(x)\n")
    assert dependencies("from planes.deep.leaf import f", root) == {"planes.deep.leaf.f", *OUTER}
    assert dependencies("import planes.deep.leaf as l\nl.f(1)", root) == {"planes.deep.leaf.f", *OUTER}


def test_star_through_star(project):
    root = project(work=BASE, middle="from .work import *\n", top="from .middle import *\n")
    assert dependencies("from planes.top import *\nouter(1)", root) == OUTER


def test_a_module_as_a_value_counts_whole(project):
    assert "planes.work" in dependencies("import planes.work as w\nuse(w)", project(work=BASE))
    assert "planes.work" in dependencies("from planes import work\ngetattr(work, name)(1)", project(work=BASE))


def test_a_name_that_is_made_while_running_counts_the_module(project):
    root = project(work=BASE + "\n    globals()['late'] = alone\n")
    assert "planes.work" in dependencies("from planes.work import late", root)


def test_statements_that_change_a_global_count(project):
    source = "TABLE = {}\ndef other(): return 1\nTABLE['x'] = other\nTABLE.update(y=2)\n"
    source += "for n in range(3):\n    TABLE[n] = n\n"
    before = closure("from planes.work import TABLE", ["planes"], project(work=source))
    assert {"planes.work.TABLE", "planes.work.other"} <= set(before)
    for changed in (
        source.replace("y=2", "y=3"),
        source.replace("range(3)", "range(4)"),
        source.replace("return 1", "return 2"),
    ):
        assert closure("from planes.work import TABLE", ["planes"], project(work=changed)) != before


def test_registered_functions_belong_to_the_register(project):
    source = "REG = []\ndef check(f):\n    REG.append(f)\n    return f\n@check\ndef one(): return 1\n"
    assert {"planes.work.REG", "planes.work.check"} <= dependencies(
        "from planes.work import check", project(work=source)
    )
    assert "planes.work.one" not in dependencies(
        "from planes.work import REG", project(work="REG = []\ndef one(): pass")
    )
    before = closure("from planes.work import check", ["planes"], project(work=source))
    assert (
        closure("from planes.work import check", ["planes"], project(work=source.replace("return 1", "return 2")))
        != before
    )


def test_a_patched_method_belongs_to_its_class(project):
    source = "from fastcore.all import patch\nclass A: pass\n@patch\ndef go(self: A): return 1\n"
    before = closure("from planes.work import A", ["planes"], project(work=source))
    assert (
        closure("from planes.work import A", ["planes"], project(work=source.replace("return 1", "return 2"))) != before
    )


def test_a_shared_third_party_decorator_ties_nothing(project):
    source = "from functools import cache\n@cache\ndef one(): return 1\n@cache\ndef two(): return 2\n"
    assert dependencies("from planes.work import one", project(work=source)) == {"planes.work.one"}


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("return x + LIMIT", "# why\n        return (x + LIMIT)", True),
        ("return x + LIMIT", "'''Doc.'''\n        return x + LIMIT", True),
        ("def alone(x):\n        return x", "def alone(x):\n        return -x", True),
        ("return x + LIMIT", "return x - LIMIT", False),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("def inner(x):", "def inner(x, y=1):", False),
    ],
)
def test_what_counts_as_a_change(project, old, new, same):
    before = fingerprint_of("planes.work.outer", project(work=BASE))
    assert old in BASE
    assert (fingerprint_of("planes.work.outer", project(work=BASE.replace(old, new))) == before) is same


def survey(code, root):
    "All that the plan is told of a notebook with one cell"
    from pipeline_project import notebook

    return Library(["planes"], root).notebook(notebook(root / "nbs" / "a.ipynb", None, code))


SHAPES = """
    from dataclasses import dataclass, field
    from . import work, other
    from .work import inner as within

    @dataclass
    class Row:
        limit: int = work.LIMIT
        rows: list = field(default_factory=lambda: [within(1)])

    class Model(other.Base):
        shared = within

        @property
        def size(self):
            return work.outer(1)

        @classmethod
        def make(cls):
            return cls()

    def nested():
        def first():
            def second():
                return work.outer(1)
            return second
        return first

    def hidden(work):
        return work.outer(1)

    def in_a_loop():
        return [work for work in range(3)], work.LIMIT

    def quoted(x: "work.Type") -> None:
        return None

    Alias = dict[str, "Row"]
    aliased: Alias = {}
    pairs = {"a": lambda x: within(x)}
    first, second = within(1), 2
"""
WORK = BASE + "\n    class Type: pass\n"
OTHER = "class Base:\n    def go(self): return step()\ndef step(): return 1\n"


@pytest.mark.parametrize(
    ("name", "also"),
    [
        ("Row", {"work.LIMIT", "work.inner"}),
        ("Model", {"work.inner", "work.outer", "work.LIMIT", "other.Base", "other.step"}),
        ("nested", {"work.outer", "work.inner", "work.LIMIT"}),
        ("hidden", set()),
        ("in_a_loop", {"work.LIMIT"}),
        ("quoted", {"work.Type"}),
        ("aliased", {"shapes.Alias"}),
        ("pairs", {"work.inner", "work.LIMIT"}),
        ("second", {"work.inner", "work.LIMIT"}),
    ],
)
def test_ways_to_write(project, name, also):
    root = project(work=WORK, other=OTHER, shapes=SHAPES)
    assert dependencies(f"from planes.shapes import {name}", root) == {
        f"planes.shapes.{name}",
        *(f"planes.{n}" for n in also),
    }


def test_a_decorator_with_arguments(project):
    source = "from .work import inner, LIMIT\ndef wrap(n):\n    return lambda f: f\n"
    source += "@wrap(inner(LIMIT))\ndef f(x): return x\n"
    root = project(work=BASE, deco=source)
    assert {"planes.work.inner", "planes.work.LIMIT", "planes.deco.wrap"} < dependencies(
        "from planes.deco import f", root
    )


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    from .fast import f\nexcept ImportError:\n    from .slow import f\n",
        "import sys\nif sys.platform == 'x':\n    from .fast import f\nelse:\n    from .slow import f\n",
        "try:\n    from .absent import f\nexcept ImportError:\n    from .fast import f\n    from .slow import f\n",
    ],
)
def test_conditional_imports_count_both_ways(project, source):
    root = project(fast="def f(): return 1", slow="def f(): return 2", pick=source)
    assert {"planes.fast.f", "planes.slow.f"} <= dependencies("from planes.pick import f\nf()", root)


def test_a_module_that_appears_is_seen(project):
    root = project(
        slow="def f(): return 2", pick="try:\n    from .fast import f\nexcept ImportError:\n    from .slow import f\n"
    )
    library = Library(["planes"], root)
    from pipeline_project import notebook

    path = notebook(root / "nbs" / "a.ipynb", None, "from planes.pick import f")
    assert set(library.notebook(path).code) == {"planes.slow.f"}
    assert library.signatures[f"{root}/planes/fast.py"] is None
    (root / "planes" / "fast.py").write_text("def f(): return 1")
    library.refresh()
    assert set(library.notebook(path).code) == {"planes.fast.f", "planes.slow.f"}


def test_packages(project):
    root = project(
        work=BASE,
        deep__leaf=BASE,
        __init__="from . import work\nfrom .work import outer as main\nfrom .deep import *\n",
    )
    (root / "planes" / "deep" / "__init__.py").write_text(
        "from . import leaf\nfrom .leaf import alone\n__all__ = ['leaf', 'alone']\n"
    )
    assert dependencies("import planes\nplanes.work.outer(1)", root) == OUTER
    assert dependencies("from planes import main", root) == OUTER
    assert dependencies("import planes\nplanes.deep.leaf.alone(1)", root) == {"planes.deep.leaf.alone"}
    assert dependencies("from planes import alone", root) == {"planes.deep.leaf.alone"}
    assert dependencies("from planes import leaf\nleaf.alone(1)", root) == {"planes.deep.leaf.alone"}


def test_a_package_without_init(tmp_path):
    (tmp_path / "planes" / "deep").mkdir(parents=True)
    (tmp_path / "planes" / "deep" / "work.py").write_text(textwrap.dedent(BASE))
    outer = {name.replace("planes.", "planes.deep.") for name in OUTER}
    assert dependencies("from planes.deep.work import outer", tmp_path) == outer
    assert dependencies("import planes.deep.work\nplanes.deep.work.outer(1)", tmp_path) == outer
    assert dependencies("from planes.deep import work\nwork.outer(1)", tmp_path) == outer


def test_all_says_what_a_star_brings(project):
    root = project(a="__all__ = ['f']\ndef f(): return 1\ndef g(): return 1\n", b="def g(): return 2\n")
    assert dependencies("from planes.a import *\nfrom planes.b import *\nf(), g()", root) == {
        "planes.a.f",
        "planes.b.g",
    }
    root = project(a="__all__ = ['f']\n__all__ += ['g']\ndef f(): return 1\ndef g(): return 1\n")
    assert dependencies("from planes.a import *\ng()", root) == {"planes.a.g"}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import importlib\nimportlib.import_module('planes.work').outer(1)", {"planes.work"}),
        ("from importlib import import_module\nm = import_module('planes.work')", {"planes.work"}),
        ("import planes.work as w\ngetattr(w, 'outer')(1)", OUTER),
        ("import sys, planes.work\nsys.modules['planes.work'].outer(1)", {"planes.work"}),
        (
            "from planes import work\nwork.inner = work.alone",
            {"planes.work.inner", "planes.work.LIMIT", "planes.work.alone"},
        ),
        ("from planes.work import outer, alone\n%timeit alone(1)", {*OUTER, "planes.work.alone"}),
        ("from planes import work\n%time work.outer(1)", OUTER),
        ("from planes import work\nx = !echo {work.outer(1)}", OUTER),
        ("from planes import work\neval('work.outer(1)')", OUTER),
        ("exec('from planes.work import outer; outer(1)')", OUTER),
        ("exec('from planes.work import outer')\nouter(1)", OUTER),
        ("if True:\n    exec('import planes.work as w')\n    w.outer(1)", {"planes.work"}),
        ("import importlib\nimportlib.import_module('.work', 'planes').outer(1)", {"planes.work"}),
        ("import importlib\nimportlib.import_module('.work', package='planes').outer(1)", {"planes.work"}),
        ("!python -m planes.work", {"planes.work"}),
        ("!python3 planes/work.py --fast", {"planes.work"}),
        ("%run ./planes/work.py", {"planes.work"}),
        ("%run -m planes.work", {"planes.work"}),
        ("%%bash\npython -m planes.work", {"planes.work"}),
        ("import os, sys\nos.system(f'{sys.executable} -m planes.work')", {"planes.work"}),
        ("import subprocess, sys\nsubprocess.run([sys.executable, 'planes/work.py'])", {"planes.work"}),
    ],
)
def test_roundabout_ways(project, code, names):
    assert set(survey(code, project(work=BASE)).code) >= names


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("from planes import work\ngetattr(work, name)(1)", "getattr with a name that is not literal"),
        ("from planes import work\nuse(work)", "it is used as a value"),
        ("from planes import work\nvars(work)", "it is used as a value"),
        ("from planes.work import late", "it does not define 'late'"),
        ("from planes.late import f", "globals() may be any of its names"),
        ("from planes.late import g", "eval of a text that is not literal"),
        ("import importlib\nimportlib.import_module('planes.work')", "it is imported by its name"),
        (
            "import importlib\nimportlib.import_module(f'planes.{name}')",
            "import_module of a name that begins with planes.",
        ),
        ("from planes.late import h", "import_module with a name that is not literal"),
    ],
)
def test_what_counts_as_a_whole_is_said(project, code, why):
    late = "import importlib\ndef f(n): return globals()[n]\ndef g(t): return eval(t)\n"
    late += "def h(n): return importlib.import_module(n)\n"
    root = project(work=BASE, late=late)
    dependencies = survey(code, root)
    module = "late" if "late import" in code else "work"
    assert f"module planes.{module} counts as a whole: {why}" in dependencies.notes
    assert dependencies.code[f"planes.{module}"][0] == "module"


SCRIPT = {"scripts/clean.py", "scripts/helper.py", *OUTER}


@pytest.fixture
def scripts(project):
    "A project with code that is no module: scripts, a shell script, a notebook, a folder for sys.path, plugins"
    finds = """
        import importlib, pkgutil, runpy
        from pathlib import Path
        HERE = Path(__file__).resolve().parent
        class Base: pass
        def beside(): exec((HERE.parent / "scripts" / "clean.py").read_text())
        def plugins(): return [c() for c in Base.__subclasses__()]
        def named(name): return importlib.import_module(f"{__name__}.{name}")
        def added(name): return importlib.import_module(__package__ + "." + name)
        def anything(name): return importlib.import_module(name)
        def run(path): return runpy.run_path(path)
    """
    plug = "from planes.finds import Base\nclass One(Base):\n    x = 1\n"
    root = project(work=BASE, finds=finds, plug=plug)
    files = {
        "scripts/clean.py": "import helper\nfrom planes.work import outer\nouter(1)\n",
        "scripts/helper.py": "LEVEL = 1\n",
        "scripts/all.sh": "set -e\npython scripts/clean.py\n",
        "scripts/odd.R": "x <- 1\n",
        "lib/tool.py": "def f(): return 1\n",
        "lib/kit/__init__.py": "from . import inner\n",
        "lib/kit/inner.py": "x = 1\n",
        "nbs/part.ipynb": '{"nbformat": 4, "cells": [{"cell_type": "code", '
        '"source": "from planes.work import outer\\nouter(1)"}]}',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("%run scripts/clean.py", SCRIPT),
        ("%run -i scripts/clean 3", SCRIPT),
        ("x = %run scripts/clean.py", SCRIPT),
        ("%time %run scripts/clean.py", SCRIPT),
        ("get_ipython().run_line_magic('run', 'scripts/clean.py')", SCRIPT),
        ("%run nbs/part.ipynb", {"nbs/part.ipynb", *OUTER}),
        ("%load scripts/clean.py", SCRIPT),
        ("!python scripts/clean.py --fast", SCRIPT),
        ("!cd . && python -u scripts/clean.py", SCRIPT),
        ("%%bash\npython scripts/clean.py", SCRIPT),
        ("!bash scripts/all.sh", {"scripts/all.sh", *SCRIPT}),
        ("!Rscript scripts/odd.R", {"scripts/odd.R"}),
        ("%%script python\nfrom planes.work import outer\nouter(1)", OUTER),
        ("!python -c 'from planes.work import outer; outer(1)'", OUTER),
        ("exec(open('scripts/clean.py').read())", SCRIPT),
        ("with open('scripts/clean.py') as f:\n    exec(compile(f.read(), 'x', 'exec'))", SCRIPT),
        ("from pathlib import Path\ncode = Path('scripts', 'clean.py').read_text()\nexec(code)", SCRIPT),
        ("import runpy\nrunpy.run_path('scripts/clean.py')", SCRIPT),
        ("import importlib.util as u\nu.spec_from_file_location('m', 'scripts/clean.py')", SCRIPT),
        ("import importlib.util as u\nu.spec_from_file_location('m', location='scripts/clean.py')", SCRIPT),
        ("import subprocess, sys\nWHAT = 'scripts/clean.py'\nsubprocess.run([sys.executable, WHAT, '-v'])", SCRIPT),
        ("import os\nos.system('python scripts/clean.py')", SCRIPT),
        ("import papermill\npapermill.execute_notebook('nbs/part.ipynb', 'out.ipynb')", {"nbs/part.ipynb", *OUTER}),
        ("STEPS = ['scripts/clean.py']", SCRIPT),
        ("from planes.finds import beside", {"planes.finds.beside", "planes.finds.HERE", *SCRIPT}),
        ("import sys\nsys.path.insert(0, 'lib')\nimport tool", {"lib/tool.py"}),
        (
            "import sys, os\nsys.path.append(os.path.join(os.getcwd(), 'lib'))\nfrom kit import inner",
            {"lib/kit/__init__.py", "lib/kit/inner.py"},
        ),
        ("import sys\nsys.path += ['lib']\nimport tool", {"lib/tool.py"}),
        ("import site\nsite.addsitedir('lib')\nimport tool", {"lib/tool.py"}),
        (
            "import pkgutil\nlist(pkgutil.iter_modules(['lib']))",
            {"lib/tool.py", "lib/kit/__init__.py", "lib/kit/inner.py"},
        ),
        (
            "import planes.plug\nfrom planes.finds import plugins",
            {"planes.finds.plugins", "planes.finds.Base", "planes.plug.One"},
        ),
        (
            "import planes.plug\nfrom planes.finds import Base\nBase.__subclasses__()",
            {"planes.finds.Base", "planes.plug.One"},
        ),
    ],
)
def test_code_that_is_reached_by_its_path_is_watched(scripts, code, names):
    dependencies = survey(code, scripts)
    assert set(dependencies.code) == names and dependencies.unresolved == ()


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("%run $name", "%run of a path that is not literal"),
        ("%run {name}.py", "%run of a path that is not literal"),
        ("%run made.py", "made.py, which does not exist"),
        ("!python made.py", "made.py, which does not exist"),
        ("!python {name}", "a Python program that is not named literally"),
        ("import os\nos.system('python made.py')", "made.py, which does not exist"),
        (
            "import subprocess, sys\nsubprocess.run([sys.executable, name])",
            "a Python program that is not named literally",
        ),
        ("import subprocess\nsubprocess.run(command)", "a command that is not literal"),
        ("exec(text)", "exec of a text that is not literal"),
        ("exec(open(name).read())", "exec of a text that is not literal"),
        ("import runpy\nrunpy.run_path(name)", "run_path of a path that is not literal"),
        (
            "import importlib.util as u\nu.spec_from_file_location('m', name)",
            "spec_from_file_location of a path that is not literal",
        ),
        ("import importlib\nimportlib.import_module(name)", "import_module with a name that is not literal"),
        ("__import__(name)", "__import__ with a name that is not literal"),
        ("import sys\nsys.path.insert(0, folder)", "modules of a folder on sys.path that is not literal"),
        ("from importlib.metadata import entry_points\nentry_points(group='planes')", "what entry points load"),
        ("import pkgutil\nlist(pkgutil.walk_packages(folders))", "modules that walk_packages finds"),
        ("from planes.finds import run", "run_path of a path that is not literal, in planes.finds"),
        ("from planes.finds import anything", "import_module with a name that is not literal, in planes.finds"),
    ],
)
def test_code_that_only_a_run_could_tell_is_named(scripts, code, what):
    assert what in survey(code, scripts).unresolved


@pytest.mark.parametrize(
    "code",
    [
        "!ls *.py",
        "!pip install x",
        "!python -m pip install x",
        "import subprocess\nsubprocess.run(['ls', folder])",
        "import asyncio\nasyncio.run(main())",
        "model.run(x)",
        "%%writefile made.py\nx = 1",
        "from planes.finds import named",
        "from planes.finds import added",
        "open('data.csv').read()",
        "names = []\nnames.append(x)",
        "eval('1 + 1')",
    ],
)
def test_what_runs_no_code_of_its_own_is_not_named(scripts, code):
    assert survey(code, scripts).unresolved == ()


def test_a_name_that_begins_with_the_name_of_the_module(project):
    init = "import importlib\ndef load(n): return importlib.import_module(f'{__name__}.{n}')\n"
    assert "planes.work" in survey("from planes import load", project(work=BASE, __init__=init)).code


def test_a_script_that_changes(scripts):
    library = Library(["planes"], scripts)
    notebook = scripts / "nbs" / "task.ipynb"
    notebook.write_text('{"nbformat": 4, "cells": [{"cell_type": "code", "source": "%run ../scripts/clean.py"}]}')
    before = library.notebook(notebook)  # by a path from the notebook's own folder
    assert before.code["scripts/clean.py"][0] == "script" and before.unresolved == ()
    (scripts / "scripts" / "helper.py").write_text("LEVEL = 2\n")
    library.refresh()
    after = library.notebook(notebook)
    assert {n for n in after.code if after.code[n] != before.code[n]} == {"scripts/helper.py"}


def test_a_product_is_no_code_that_is_watched(scripts):
    library = Library(["planes"], scripts, outputs=[str(scripts / "scripts" / "clean.py")])
    notebook = scripts / "task.ipynb"
    notebook.write_text('{"nbformat": 4, "cells": [{"cell_type": "code", "source": "x = \'scripts/clean.py\'"}]}')
    assert library.notebook(notebook).code == {}


LAZY = "import importlib\nWHERE = {'outer': '.work'}\n"
LAZY += "def __getattr__(name):\n    return getattr(importlib.import_module(WHERE[name], __name__), name)\n"


@pytest.mark.parametrize(
    ("init", "code"),
    [
        (LAZY, "from planes import outer\nouter(1)"),
        (
            "import lazy_loader as z\n__getattr__, __dir__, __all__ = z.attach(__name__, {'work': ['f']})\n",
            "import planes\nplanes.f(1)",
        ),
        ("import pkgutil\nFOUND = [m.name for m in pkgutil.iter_modules(__path__)]\n", "from planes import FOUND"),
        ("", "import pkgutil, planes\nfor m in pkgutil.iter_modules(planes.__path__): m"),
        (
            "def plugin(n):\n    return __import__('planes.' + n)\n",
            "import importlib, planes\nimportlib.import_module(f'planes.{n}')",
        ),
    ],
)
def test_modules_that_are_found_while_running(project, init, code):
    dependencies = survey(code, project(work=BASE, __init__=init))
    assert "planes.work" in dependencies.code and any(
        "planes.work counts as a whole" in note for note in dependencies.notes
    )


def test_a_star_brings_modules_that_all_names(project):
    assert (
        dependencies("from planes import *\nwork.outer(1)", project(work=BASE, __init__="__all__ = ['work']\n"))
        == OUTER
    )


def test_odd_places(project):
    more = """
        import functools
        import typing
        from . import work
        if typing.TYPE_CHECKING:
            from .work import alone
        with open("x") as f:
            INSIDE = work.outer
        def early(f=work.inner): return f
        part = functools.partial(work.inner, 1)
        def later(x: "alone") -> f"{work.LIMIT}": return lambda work: work
        async def waits():
            async with work.outer(1) as a:
                return [b async for b in a]
        def shadow():
            for work in range(3):
                pass
            return work
        def declared():
            global work
            work = work.alone
        def caught():
            try:
                pass
            except OSError as work:
                return work
        def matched(x):
            match x:
                case {"a": work}: return work
        if work.LIMIT:
            def choice(): return 1
        else:
            def choice(): return work.alone(1)
    """
    root = project(work=BASE, more=more)
    expected = {
        "INSIDE": {"inner", "LIMIT", "outer"}, "early": {"inner", "LIMIT"}, "part": {"inner", "LIMIT"},
        "later": {"alone", "LIMIT"},
        "waits": {"inner", "LIMIT", "outer"}, "shadow": set(), "declared": {"alone"}, "caught": set(), "matched": set(),
        "choice": {"LIMIT", "alone"},
    }  # fmt: skip
    for name, names in expected.items():
        assert {n for n in dependencies(f"from planes.more import {name}", root) if "work." in n} == {
            f"planes.work.{n}" for n in names
        }, name


def test_a_name_in_globals_that_is_literal(project):
    root = project(work=BASE + "\n    def pick(): return globals()['alone']\n")
    dependencies = survey("from planes.work import pick", root)
    assert set(dependencies.code) == {"planes.work.pick", "planes.work.alone"} and not dependencies.notes


PATCHING = {
    "an assignment": "from . import work\ndef faster(x): return x\nwork.inner = faster\n",
    "setattr": "from . import work\ndef faster(x): return x\nsetattr(work, 'inner', faster)\n",
    "a block": "from . import work\ndef faster(x): return x\nif True:\n    work.inner = faster\n",
    "a patch": "from fastcore.all import patch\nfrom .work import Type\n@patch\ndef faster(self: Type): return 1\n",
    "a register": "from .work import register\n@register\ndef faster(x): return x\n",
    "a subclass": "from .work import Plugin\nclass faster(Plugin): pass\n",
    "a method": "from .work import REGISTER\n@REGISTER.task('faster')\ndef faster(x): return x\n",
}
PATCHED = """
    KNOWN = []
    class Type: pass
    class Registry:
        def task(self, name): return lambda f: f
    REGISTER = Registry()
    class Plugin:
        def __init_subclass__(cls): KNOWN.append(cls)
    def register(f):
        KNOWN.append(f)
        return f
    def inner(x): return x
    def outer(x): return inner(x)
    def wrap(f): return f
"""


@pytest.mark.parametrize("source", PATCHING.values(), ids=PATCHING)
@pytest.mark.parametrize(
    "imports", ["import planes.patches\n", "from planes import patches\n", "import planes.chain\n", ""]
)
def test_what_an_import_changes_elsewhere(project, source, imports):
    modules = {"work": PATCHED, "patches": source, "chain": "def f():\n    pass\nfrom . import patches\n"}
    root = project(**modules, __init__="" if imports else "from . import patches\n")
    code = imports + "from planes.work import outer\nouter(1)"
    before = survey(code, root).code
    assert "planes.patches.faster" in before
    changed = source.replace("return x\n", "return -x\n").replace("return 1", "return 2").replace("pass", "x = 1")
    (root / "planes" / "patches.py").write_text(changed)
    assert survey(code, root).code != before


def test_an_import_that_changes_nothing_elsewhere(project):
    source = "from .work import wrap, inner\nimport numpy as np\nX = np.ones(3)\n@wrap\ndef f(x): return inner(x)\n"
    source += "if __name__ == '__main__':\n    np.seterr(f(1))\n"
    root = project(work=PATCHED, patches=source)
    assert "planes.patches.f" not in dependencies("import planes.patches\nfrom planes.work import outer", root)
    assert survey("import planes.patches", root).modules == ()


def test_settings_of_other_libraries_are_an_effect(project):
    root = project(work=BASE, plots="import matplotlib\nmatplotlib.use('Agg')\n", __init__="from . import plots\n")
    dependencies = survey("from planes.work import alone", root)
    assert dependencies.code["import planes.plots"][0] == "the effect of" and dependencies.modules == ("matplotlib",)


def test_imported_packages(project):
    work = "import numpy as np\nimport pandas\ndef f(): return np.ones(1)\ndef h(): return pandas\n"
    work += "def g():\n    import torch.nn as nn\n    return nn\n"
    root = project(work=work)
    assert survey("import json, os.path\nfrom planes.work import f", root).modules == ("json", "numpy", "os")
    assert survey("from planes.work import g\ng()", root).modules == ("torch",)
    assert survey("import planes.work as w\nuse(w)", root).modules == ("numpy", "pandas", "torch")
    assert survey("from scipy import *\nimport mlnb.data.profiles", root).modules == ("mlnb", "scipy")


def test_a_module_beside_the_project_file_is_first_party(project):
    root = project(work="from helpers import tidy\ndef f(): return tidy()\n")
    (root / "helpers.py").write_text("def tidy(): return 1\ndef other(): return 2\n")
    assert dependencies("from planes.work import f", root) == {"planes.work.f", "helpers.tidy"}


def test_what_was_read_is_kept_and_believed_only_where_it_is_sure(project, monkeypatch):
    import os

    from pipeline_project import notebook

    import mlnb.notebooks.fingerprint as module

    root = project(work=BASE)
    path = notebook(root / "nbs" / "a.ipynb", None, "from planes.work import outer")
    for file in (path, root / "planes" / "work.py", root / "planes" / "__init__.py"):
        os.utime(file, (1, 1))
    cache = {}
    first = Library(["planes"], root, cache).notebook(path)
    with monkeypatch.context() as m:
        m.setattr(module, "summary", None)  # nothing is parsed again
        assert Library(["planes"], root, cache).notebook(path) == first
    os.utime(root / "planes" / "work.py", (4e9, 4e9))  # the clock was put back
    Library(["planes"], root, cache).notebook(path)
    with monkeypatch.context() as m:
        m.setattr(module, "summary", None)
        with pytest.raises(TypeError):
            Library(["planes"], root, cache).notebook(path)
    damaged = {key: [3] if isinstance(value, list) else value for key, value in cache.items()}
    assert Library(["planes"], root, damaged).notebook(path) == first


def test_an_edit_in_the_same_tick(project):
    "Same size, same time: what was just written is read again"
    root = project(work=BASE)
    library = Library(["planes"], root)
    from pipeline_project import notebook

    path = notebook(root / "nbs" / "a.ipynb", None, "from planes.work import outer")
    seen = set()
    for n in range(20):
        (root / "planes" / "work.py").write_text(textwrap.dedent(BASE).replace("LIMIT = 3", f"LIMIT = {n + 10}"))
        library.refresh()
        seen.add(library.notebook(path).code["planes.work.LIMIT"])
    assert len(seen) == 20


def test_third_party_code_is_not_followed():
    assert closure("import numpy as np\nfrom json import loads\nnp.ones(3)", ["planes"]) == {}


def test_broken_and_cyclic_modules(project):
    root = project(a="from .b import g\ndef f(): return g()", b="from .a import f\ndef g(): return f()")
    assert dependencies("from planes.a import f", root) == {"planes.a.f", "planes.b.g"}
    root = project(a="def f(:\n")
    assert dependencies("from planes.a import f", root) == {"planes.a"}


def test_names_that_do_not_exist(project):
    root = project(work=BASE)
    with pytest.raises(NotebookError, match=r"defines no 'outre' \(did you mean 'planes.work.outer'\?\)"):
        fingerprint_of("planes.work.outre", root)
    with pytest.raises(NotebookError, match=r"there is no module for 'nowhere.f'"):
        fingerprint_of("nowhere.f", root)


def test_it_imports_nothing_of_ours(project):
    root = project(work="raise SystemExit('imported')\ndef f(): pass")
    probe = (
        "from mlnb.notebooks.fingerprint import fingerprint_of; import sys\n"
        "fingerprint_of('planes.work.f'); assert 'planes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=root, check=True)


def test_normalised_is_the_same_text_for_every_layout():
    assert normalised("x = 1 # one") == normalised("x=1")
    assert normalised("x = 1") != normalised("x = 1.0")


TRACE = """
import ast, inspect, sys
from pathlib import Path
import mlnb
from mlnb.notebooks.fingerprint import closure

code, package, ran = sys.argv[1], Path(mlnb.__file__).parent, set()
ours = f"{package}/"

def call(frame, event, argument):  # millions of times: texts, not paths
    here = frame.f_code
    # a function, not a body of a class
    if event == "call" and here.co_filename.startswith(ours) and here.co_flags & inspect.CO_OPTIMIZED:
        parts = Path(here.co_filename).relative_to(package.parent).with_suffix("").parts
        ran.add((".".join(p for p in parts if p != "__init__"), here.co_qualname.split(".")[0]))

# bodies of modules also compute constants that the cell does not use
imports = [n for n in ast.parse(code).body if isinstance(n, (ast.Import, ast.ImportFrom))]
exec(compile(ast.Module(imports, []), "imports", "exec"), {})
sys.setprofile(call)
try:
    exec(compile(code, "cell", "exec"), {"__name__": "cell"})
finally:
    sys.setprofile(None)
reached = closure(code, ["mlnb"], package.parent)
missed = {f"{m}.{n}" for m, n in ran if f"{m}.{n}" not in reached and m not in reached and n[0] != "<"}
assert len(ran) > 20 and not missed, missed
"""


@pytest.mark.parametrize(
    "code",
    [
        "from mlnb.cli.plan import planned_states\nfrom mlnb.project.settings import load_settings as l\n"
        "planned_states(l())\nplanned_states(l())",
        "from mlnb.cli import main\nmain.cli(['plan', '--json'], standalone_mode=False)",
        "import numpy, mlnb.models.tabular as t\nt.Encoder.fit({'a': numpy.array(['x', 'y'])}, ['a'], [])\n"
        "from mlnb.data.profiles import Profile\nimport pandas\n"
        "Profile.of(pandas.DataFrame({'x': [1.0, 2.0]})).to_bytes()",
    ],
)
def test_whatever_runs_was_reached(tmp_path, code):
    "The search against the interpreter: every function of ours that a cell ran is in the closure of the cell"
    from pipeline_project import make

    finished = subprocess.run(
        [sys.executable, "-c", TRACE, code], cwd=make(tmp_path / "p"), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
