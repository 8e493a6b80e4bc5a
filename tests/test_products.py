"""Products that are links, that hold links, or that are no files at all: nothing is ever written through a link."""

import json
import os
import socket
from pathlib import Path

import pytest
from pipeline_project import edit, finish, make, planner

from mlnb.pipelines.products import Staging, content, remove_orphaned_stages
from mlnb.project.errors import PipelineError
from mlnb.project.file_signatures import file_signature
from mlnb.project.files import lock_file


@pytest.fixture
def root(tmp_path):
    "A folder with things of a person in it, and a folder of products"
    for name in ("versions", "out", "big"):
        (tmp_path / name).mkdir()
    (tmp_path / "versions" / "v1.txt").write_text("precious")
    (tmp_path / "big" / "part").write_text("precious too")
    return tmp_path


def mine(root):
    return {p.name: p.read_text() for p in (root / "versions" / "v1.txt", root / "big" / "part")}


def publish(root, write, *names):
    "Have a task write products of these names below out/, twice"
    names = names or ("latest",)
    for _ in range(2):
        with Staging("other", {name: root / "out" / name for name in names}) as stage:
            write(*(stage.path(name) for name in names))
            stage.publish()
    return root / "out" / names[0]


BEFORE = {
    "nothing": lambda place: None,
    "a link to a file": lambda place: place.symlink_to("../versions/v1.txt"),
    "a link to a folder": lambda place: place.symlink_to("../big"),
    "an absolute link": lambda place: place.symlink_to(place.parent.parent / "big"),
    "a link that leads nowhere": lambda place: place.symlink_to("nowhere"),
    "a link to itself": lambda place: place.symlink_to(place.name),
    "a link to another product": lambda place: place.symlink_to("data.txt"),
    "a link to its own folder": lambda place: place.symlink_to("."),
    "a file": lambda place: place.write_text("old"),
    "a folder": lambda place: place.mkdir(),
    "a FIFO": os.mkfifo,
    "a hard link": lambda place: os.link(place.parent.parent / "versions" / "v1.txt", place),
}
WRITTEN = {
    "a file": (
        lambda place: place.write_text("new"),
        lambda place: place.read_text() == "new" and not place.is_symlink(),
    ),
    "a folder": (
        lambda place: (place.mkdir(), (place / "a").write_text("new")),
        lambda place: (place / "a").read_text() == "new",
    ),
    "a link": (
        lambda place: place.symlink_to(place.parents[2] / "versions" / "v1.txt"),
        lambda place: place.read_text() == "precious",
    ),
    "a link to a folder": (
        lambda place: place.symlink_to(place.parents[2] / "big"),
        lambda place: (place / "part").exists(),
    ),
    "a hard link": (
        lambda place: os.link(place.parents[2] / "versions" / "v1.txt", place),
        lambda place: place.read_text() == "precious",
    ),
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize(("write", "right"), WRITTEN.values(), ids=WRITTEN)
def test_what_stands_in_the_place_of_a_product_is_replaced_and_never_followed(root, before, write, right):
    (root / "out" / "data.txt").write_text("data")
    before(root / "out" / "latest")
    assert right(publish(root, write))
    assert (
        mine(root) == {"v1.txt": "precious", "part": "precious too"}
        and (root / "out" / "data.txt").read_text() == "data"
    )
    assert not list((root / "out").glob(".*"))


LINKS = {  # what a task writes as a link, and the text of the link in its place
    "an absolute path": (
        lambda latest, data: latest.symlink_to(latest.parents[2] / "versions" / "v1.txt"),
        "{root}/versions/v1.txt",
    ),
    "a relative path from where it is written": (
        lambda latest, data: latest.symlink_to("../../versions/v1.txt"),
        "../versions/v1.txt",
    ),
    "a relative path from where it belongs": (
        lambda latest, data: latest.symlink_to("../versions/v1.txt"),
        "../versions/v1.txt",
    ),
    "another product": (lambda latest, data: latest.symlink_to(data), "{root}/out/data"),
    "another product by its name": (lambda latest, data: latest.symlink_to("data"), "data"),
    "a file inside another product": (lambda latest, data: latest.symlink_to(data / "a"), "{root}/out/data/a"),
}


@pytest.mark.parametrize(("write", "text"), LINKS.values(), ids=LINKS)
def test_a_link_leads_to_the_same_thing_from_its_new_place(root, write, text):
    def task(latest, data):
        data.mkdir()
        (data / "a").write_text("1")
        write(latest, data)

    latest = publish(root, task, "latest", "data")
    assert os.readlink(latest) == text.format(root=root) and latest.exists()
    assert mine(root) == {"v1.txt": "precious", "part": "precious too"}


def test_links_inside_a_folder_are_moved_as_links(root):
    def task(model):
        model.mkdir()
        (model / "ckpt-3").mkdir()
        (model / "ckpt-3" / "w").write_text("1")
        links = {
            "best": model / "ckpt-3",
            "last": "ckpt-3",
            "here": "../../../big",
            "there": "../../big",
            "gone": "nowhere",
            "up": ".",
        }
        for name, text in links.items():
            (model / name).symlink_to(text)

    model = publish(root, task)
    texts = {p.name: os.readlink(p) for p in model.iterdir() if p.is_symlink()}
    ends = {
        "best": f"{root}/out/latest/ckpt-3",
        "last": "ckpt-3",
        "here": "../../big",
        "there": "../../big",
        "gone": "nowhere",
        "up": ".",
    }
    assert texts == ends
    assert (
        (model / "best" / "w").read_text() == "1"
        and (model / "here" / "part").exists()
        and mine(root)["part"] == "precious too"
    )


WRONG = {
    "itself": (lambda place: place.symlink_to(place.parents[1] / "latest"), "is a link that leads back to itself"),
    "itself by its name": (lambda place: place.symlink_to("latest"), "is a link that leads back to itself"),
    "nowhere": (
        lambda place: place.symlink_to("/nowhere/at/all"),
        "is a link to /nowhere/at/all, which does not exist",
    ),
    "a device": (lambda place: place.symlink_to("/dev/null"), "is a link to /dev/null, a device"),
    "a FIFO": (os.mkfifo, "is a FIFO; a product is a file, a folder, or a link to one"),
    "a FIFO in a folder": (lambda place: (place.mkdir(), os.mkfifo(place / "pipe")), "contains pipe, which is a FIFO"),
    "a FIFO behind a link": (
        lambda place: (os.mkfifo(place.parent / "p"), place.symlink_to(place.parent / "p")),
        "which does not exist",
    ),
    "nothing": (lambda place: None, "ended without writing latest"),
}


@pytest.mark.parametrize(("write", "says"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_product_is_one_sentence(root, write, says):
    (root / "out" / "latest").write_text("old")
    with pytest.raises(PipelineError) as e:
        publish(root, write)
    assert says in str(e.value) and "earlier products are unchanged" in str(e.value)
    assert (root / "out" / "latest").read_text() == "old" and not list((root / "out").glob(".*"))


def test_two_links_that_lead_to_each_other(root):
    with pytest.raises(PipelineError, match=r"product a .* is a link that leads back to itself"):
        publish(root, lambda a, b: (a.symlink_to("b"), b.symlink_to("a")), "a", "b")


def test_a_socket_is_named_too(root, monkeypatch):
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as listener:
        with pytest.raises(PipelineError, match="contains s, which is a socket"):
            publish(root, lambda place: (place.mkdir(), listener.bind(os.path.relpath(place / "s"))))
        listener.close()


CHANGES = {
    "the text": lambda root: (root / "out" / "l").unlink() or (root / "out" / "l").symlink_to("../versions/same.txt"),
    "the content": lambda root: (root / "versions" / "v1.txt").write_text("changed"),
    "a folder behind it": lambda root: (root / "big" / "part").write_text("changed"),
    "a folder behind it has more": lambda root: (root / "big" / "more").touch(),
    "a link inside": lambda root: (
        (root / "out" / "f" / "in").unlink() or (root / "out" / "f" / "in").symlink_to("../../versions/same.txt")
    ),
    "it became a file": lambda root: (root / "out" / "l").unlink() or (root / "out" / "l").write_text("precious"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_both_the_text_of_a_link_and_what_it_leads_to_count(root, change):
    (root / "versions" / "same.txt").write_text("precious")
    (root / "out" / "l").symlink_to("../versions/v1.txt")
    (root / "out" / "f").mkdir()
    (root / "out" / "f" / "in").symlink_to("../../versions/v1.txt")
    (root / "out" / "f" / "big").symlink_to("../../big")
    every = [root / "out" / "l", root / "out" / "f"]
    before = [content(p) for p in every]
    assert [content(p, b)["sha256"] for p, b in zip(every, before, strict=True)] == [b["sha256"] for b in before]
    change(root)
    after = [content(p, b) for p, b in zip(every, before, strict=True)]
    assert [a["sha256"] for a in after] != [b["sha256"] for b in before]
    assert json.loads(json.dumps(after)) == after


def test_links_that_lead_in_circles_end(root):
    for a, b in (("a", "b"), ("b", "a")):
        (root / a).mkdir()
        (root / a / "to").symlink_to(f"../{b}")
        (root / a / "up").symlink_to("..")
        (root / a / a).write_text("1")
    before = content(root / "a")["sha256"]
    (root / "b" / "b").write_text("2")
    assert content(root / "a")["sha256"] != before
    assert file_signature(root / "a")[0][0] == "a" and len(file_signature(root / "a")) == 3


@pytest.fixture
def project(tmp_path):
    root = make(tmp_path / "project")
    edit(root / "pipeline.yaml", "product: out/other.ipynb", "product: {nb: out/other.ipynb, latest: out/latest}")
    (root / "v1.txt").write_text("1")
    plan = planner(root)
    finish(plan, "first", "second")
    start_fingerprint = plan.begin("other")
    (root / "out" / "other.ipynb").write_text("1")
    (root / "out" / "latest").symlink_to("../v1.txt")
    plan.commit("other", start_fingerprint, "run-1", 1.0)
    assert {s.state for s in planner(root).plan()} == {"current"}
    return root


BROKEN = {
    "a loop": (lambda place: place.symlink_to("latest"), "latest cannot be read: Too many levels of symbolic links"),
    "nowhere": (lambda place: place.symlink_to("nowhere"), "latest does not exist"),
    "a FIFO": (os.mkfifo, "latest cannot be read: it is a FIFO, not a file or a folder"),
    "a device": (
        lambda place: place.symlink_to("/dev/null"),
        "latest cannot be read: it is a device, not a file or a folder",
    ),
    "another file": (lambda place: place.symlink_to("sum.txt"), "latest was modified after the run"),
}


@pytest.mark.parametrize(("change", "why"), BROKEN.values(), ids=BROKEN)
def test_a_plan_says_what_became_of_a_product(project, change, why):
    (project / "out" / "latest").unlink()
    change(project / "out" / "latest")
    assert {s.name: s.reasons for s in planner(project).plan() if s.reasons} == {"other": (why,)}


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket"])
def test_an_input_that_cannot_be_read_is_named(project, kind, monkeypatch):
    monkeypatch.chdir(project)
    edit(project / "pipeline.yaml", "latest: out/latest}", "latest: out/latest}\n    inputs: [in.csv]")
    with socket.socket(socket.AF_UNIX) as listener:
        place = Path("in.csv")
        {
            "a FIFO": os.mkfifo,
            "a device": lambda p: p.symlink_to("/dev/zero"),
            "a socket": lambda p: listener.bind(str(p)),
        }[kind](place)
        with pytest.raises(
            PipelineError, match=rf"task 'other': {project}/in.csv cannot be read: it is {kind}, not a file or a folder"
        ):
            planner(project).plan()


def test_a_long_file_can_be_called_off(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 42)
    asked = []
    with pytest.raises(PipelineError, match="interrupted"):
        content(tmp_path / "sparse", is_cancelled=lambda: bool(asked.append(1)) or len(asked) > 2)


def test_only_staging_folders_that_nobody_uses_are_swept(root):
    notes, out = root / "notes", {"a": root / "out" / "a", "b": root / "big" / "b"}
    for task in ("killed", "waits", "runs"):
        with Staging(task, out, notes=notes) as stage:
            stage.path("a").write_text("half")
            stage.keep_on_exit = True
    (notes / "torn").write_text('["/')
    (notes / "alien").write_text(json.dumps([str(root / "versions")]))
    held = lock_file(notes / "runs", flags=os.O_RDONLY)
    remove_orphaned_stages(notes, lambda task: task == "waits")
    os.close(held)
    left = {p.name for folder in ("out", "big") for p in (root / folder).iterdir()}
    assert left == {".stage-pipeline-waits", ".stage-pipeline-runs", "part"} and (root / "versions" / "v1.txt").exists()
    assert {p.name for p in notes.iterdir()} == {"waits", "runs"}


def test_staging_folders_that_are_links_are_not_followed(root):
    (root / "out" / ".stage-pipeline-other").symlink_to("../versions")
    (root / "notes").mkdir()
    (root / "notes" / "other").write_text(json.dumps([str(root / "out" / ".stage-pipeline-other")]))
    remove_orphaned_stages(root / "notes", lambda task: False)
    assert not list((root / "out").iterdir()) and mine(root)["v1.txt"] == "precious"
