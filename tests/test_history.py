"""How runs differ."""

import pytest
from pipeline_project import edit, finish, make, notebook, planner

from mlnb.pipelines.changes import describe_changes
from mlnb.pipelines.history import changed_values


def _class(root, size):
    (root / "planes" / "work.py").write_text(
        f"class Planes:\n    size = {size}\n\n    def __len__(self):\n        return self.size\n"
    )


def _library(old, new):
    return lambda root: edit(root / "planes" / "work.py", old, new)


ONE_WORDING = {
    "a class": (lambda root: _class(root, 2), ["class planes.work.Planes changed"]),
    "a class that is not used": (
        lambda root: notebook(root / "nbs" / "first.ipynb", PARAMETERS, "1"),
        ["class planes.work.Planes is not used any more", "its notebook changed"],
    ),
    "a parameter": (
        lambda root: (root / "env.yaml").write_text("n: [2, 3]\n"),
        ["parameter n changed from [1] to [2, 3]"],
    ),
    "an input": (lambda root: (root / "in.csv").write_text("2"), ["input in.csv changed"]),
    "an input that is gone": (lambda root: (root / "in.csv").unlink(), ["input in.csv does not exist any more"]),
    "an upstream task": (lambda root: (root / "out" / "other.ipynb").write_text("2"), ["output of other changed"]),
}  # fmt: skip
PARAMETERS = 'upstream = ["other"]\nproduct = None\nn = None'


@pytest.mark.parametrize(("change", "words"), ONE_WORDING.values(), ids=ONE_WORDING)
def test_a_change_has_one_wording_in_the_plan_and_between_runs(tmp_path, change, words):
    root = make(tmp_path / "project")
    _class(root, 1)
    notebook(root / "nbs" / "first.ipynb", PARAMETERS, "from planes.work import Planes\nlen(Planes())")
    edit(root / "pipeline.yaml", 'params: {n: "{{n}}"}', 'params: {n: "{{n}}"}\n    inputs: [in.csv]')
    (root / "env.yaml").write_text("n: [1]\n")
    (root / "in.csv").write_text("1")
    plan = planner(root)
    finish(plan, *plan.spec.tasks)
    before = plan.begin("first").made_from
    change(root)
    plan = planner(root)
    after = plan.begin("first").made_from
    assert describe_changes(before, after) == words
    assert list(plan.decide("first").reasons) == words


def test_what_is_not_known_is_not_compared():
    part = {"notebook": "0123abcd", "packages": {"torch": "2.8"}}
    assert describe_changes(None, part) == describe_changes(part, None) == describe_changes(part, part) == []
    assert describe_changes(part, {"notebook": "0123abcd"}) == ["torch is not imported any more, or not installed"]
    many = {"code": {f"planes.work.f{i}": ["function", "1"] for i in range(12)}}
    assert describe_changes({"code": {}, "notebook": None}, many)[-1] == "and 2 more changes of code"


def test_a_parameter_that_became_none_has_changed():
    assert changed_values({"a": None}, {}) == {"a": (None, None)} and changed_values({"a": 1}, {"a": 1}) == {}
