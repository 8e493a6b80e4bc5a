"""What a notebook's code reaches, through every way that Python has to import a name."""

import subprocess
import sys
import textwrap

import pytest

from mlnb.notebooks.fingerprint import closure, normalised, of
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


def reached(code, root):
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
    assert reached(code, project(work=BASE)) == OUTER


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
    assert reached("from planes.other import f\nf(1)", project(work=BASE, other=module)) == names


def test_re_export_by_the_package(project):
    root = project(work=BASE, __init__="from .work import outer\n")
    assert reached("from planes import outer\nouter(1)", root) == OUTER
    assert reached("import planes\nplanes.outer(1)", root) == OUTER


def test_relative_import_from_a_sub_package(project):
    root = project(work=BASE, deep__leaf="from ..work import outer\ndef f(x): return outer(x)\n")
    assert reached("from planes.deep.leaf import f", root) == {"planes.deep.leaf.f", *OUTER}
    assert reached("import planes.deep.leaf as l\nl.f(1)", root) == {"planes.deep.leaf.f", *OUTER}


def test_star_through_star(project):
    root = project(work=BASE, middle="from .work import *\n", top="from .middle import *\n")
    assert reached("from planes.top import *\nouter(1)", root) == OUTER


def test_a_module_as_a_value_counts_whole(project):
    assert "planes.work" in reached("import planes.work as w\nuse(w)", project(work=BASE))
    assert "planes.work" in reached("from planes import work\ngetattr(work, name)(1)", project(work=BASE))


def test_a_name_that_is_made_while_running_counts_the_module(project):
    root = project(work=BASE + "\n    globals()['late'] = alone\n")
    assert "planes.work" in reached("from planes.work import late", root)


def test_statements_that_change_a_global_count(project):
    source = "TABLE = {}\ndef other(): return 1\nTABLE['x'] = other\nTABLE.update(y=2)\nfor n in range(3):\n    TABLE[n] = n\n"
    before = closure("from planes.work import TABLE", ["planes"], project(work=source))
    assert {"planes.work.TABLE", "planes.work.other"} <= set(before)
    for changed in (source.replace("y=2", "y=3"), source.replace("range(3)", "range(4)"), source.replace("return 1", "return 2")):
        assert closure("from planes.work import TABLE", ["planes"], project(work=changed)) != before


def test_registered_functions_belong_to_the_register(project):
    source = "REG = []\ndef check(f):\n    REG.append(f)\n    return f\n@check\ndef one(): return 1\n"
    assert {"planes.work.REG", "planes.work.check"} <= reached("from planes.work import check", project(work=source))
    assert "planes.work.one" not in reached("from planes.work import REG", project(work="REG = []\ndef one(): pass"))
    before = closure("from planes.work import check", ["planes"], project(work=source))
    assert closure("from planes.work import check", ["planes"], project(work=source.replace("return 1", "return 2"))) != before


def test_a_patched_method_belongs_to_its_class(project):
    source = "from fastcore.all import patch\nclass A: pass\n@patch\ndef go(self: A): return 1\n"
    before = closure("from planes.work import A", ["planes"], project(work=source))
    assert closure("from planes.work import A", ["planes"], project(work=source.replace("return 1", "return 2"))) != before


def test_a_shared_third_party_decorator_ties_nothing(project):
    source = "from functools import cache\n@cache\ndef one(): return 1\n@cache\ndef two(): return 2\n"
    assert reached("from planes.work import one", project(work=source)) == {"planes.work.one"}


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
    before = of("planes.work.outer", project(work=BASE))
    assert old in BASE
    assert (of("planes.work.outer", project(work=BASE.replace(old, new))) == before) is same


def test_third_party_code_is_not_followed():
    assert closure("import numpy as np\nfrom json import loads\nnp.ones(3)", ["planes"]) == {}


def test_broken_and_cyclic_modules(project):
    root = project(a="from .b import g\ndef f(): return g()", b="from .a import f\ndef g(): return f()")
    assert reached("from planes.a import f", root) == {"planes.a.f", "planes.b.g"}
    root = project(a="def f(:\n")
    assert reached("from planes.a import f", root) == {"planes.a"}


def test_names_that_do_not_exist(project):
    root = project(work=BASE)
    with pytest.raises(NotebookError, match=r"defines no 'outre' \(did you mean 'planes.work.outer'\?\)"):
        of("planes.work.outre", root)
    with pytest.raises(NotebookError, match=r"there is no module for 'nowhere.f'"):
        of("nowhere.f", root)


def test_it_imports_nothing_of_ours(project):
    root = project(work="raise SystemExit('imported')\ndef f(): pass")
    probe = "from mlnb.notebooks.fingerprint import of; import sys; of('planes.work.f'); assert 'planes' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], cwd=root, check=True)


def test_normalised_is_the_same_text_for_every_layout():
    assert normalised("x = 1 # one") == normalised("x=1")
    assert normalised("x = 1") != normalised("x = 1.0")
