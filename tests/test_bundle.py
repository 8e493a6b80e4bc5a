import json
import os
import shutil
import signal
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import toy_project

from mlnb.data.fields import Field, columns_of, records_of
from mlnb.models.bundle import Bundle
from mlnb.models.watcher import read_releases
from mlnb.models.write_bundle import Samples
from mlnb.project.errors import BundleError, ServingError
from mlnb.project.settings import default_settings
from mlnb.serving.routing import RoutingFile


@pytest.fixture
def folder(toy, tmp_path):
    "A bundle of one's own to break"
    return shutil.copytree(toy / "products/bundle", tmp_path / "bundle")


def manifest(folder, **changed):
    "The manifest with values changed, written back"
    text = json.loads((folder / "bundle.json").read_text())
    text.update(changed)
    (folder / "bundle.json").write_text(json.dumps(text))


def refused(folder, *words):
    with pytest.raises(BundleError) as e:
        Bundle.load(folder).self_test()
    for word in (*words, "mlnb run"):
        assert word in str(e.value)


def test_a_bundle_loads_and_proves_itself(folder):
    bundle = Bundle.load(folder)
    assert (bundle.name, bundle.version, bundle.reference) == ("toy", "v1", b"profile")
    assert bundle.self_test() == 12
    assert bundle.samples["requests"][0]["departure"] == "2013-07-01T05:00:00Z"
    assert bundle.decide(np.array([0.2, 1 / 3, 0.9])).tolist() == [False, True, True]


def test_samples_hold_missing_values(folder):
    assert None in Bundle.load(folder).samples["features"]["backlog"]


def test_no_bundle(tmp_path):
    refused(tmp_path, "no bundle.json")


@pytest.mark.parametrize("name", ["samples.json", "model/weights.safetensors", "reference.profile"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, name, "is missing")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_manifest(folder, cut):
    whole = (folder / "bundle.json").read_bytes()
    (folder / "bundle.json").write_bytes(whole[:cut])
    refused(folder, "bundle.json is damaged")


def test_a_manifest_that_is_no_object(folder):
    (folder / "bundle.json").write_text("[]")
    refused(folder, "bundle.json is damaged: it is not a JSON object")


def test_a_value_of_a_wrong_type(folder):
    manifest(folder, threshold="high")
    refused(folder, "bundle.json is damaged", "threshold")


DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize("name", ["bundle.json", "samples.json"])
@pytest.mark.parametrize(("change", "says"), [
    (lambda text: text.replace(b"{", b'{"x": ' + DEEP + b",", 1), "nested too deeply"),
    (lambda text: b'{"format": 1, "requests": 1,' + text.lstrip()[1:], "is repeated in an object"),
    (lambda text: text.replace(b"0.3", b"NaN").replace(b": [\n   0.", b": [\n   NaN, 0."), "is damaged"),
    (lambda text: text.replace(b"0.3", b"1e999").replace(b": [\n   0.", b": [\n   1e999, 0."), "is damaged"),
    (lambda text: text.replace(b"UA", b"\xff"), "is damaged"),
    (lambda text: text.replace(b"UA", b"\\ud800"), "is damaged"),
    (lambda text: text[:-1] + b" " * (65 << 20) + b"}", "the limit is 64 MB"),
    (lambda text: b"null", "is damaged"),
    (lambda text: b"", "is damaged"),
])  # fmt: skip
def test_json_that_no_reader_should_believe_is_a_bundle_error(folder, name, change, says):
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(changed := change(text))
    assert changed != text
    if name == "samples.json":
        names = json.loads((folder / "bundle.json").read_text())["files"]
        manifest(folder, files=names | {name: sha256(changed).hexdigest()})
    refused(folder, name, says)


FIELD = {"name": "carrier", "type": "string", "description": "", "example": "UA"}


@pytest.mark.parametrize(("changed", "says"), [
    ({"threshold": -0.1}, ">= 0"), ({"threshold": 1.5}, "<= 1"), ({"threshold": None}, "threshold"),
    ({"threshold": True}, "threshold"),
    ({"version": ""}, "version"), ({"version": "v\x1b[2J"}, "version"), ({"name": "x" * 300}, "name"),
    ({"format": True}, "format"),
    ({"request": [FIELD | {"type": "text"}]}, "has type 'text'"), ({"request": [FIELD, FIELD]},
    "is repeated in the request"),
    ({"request": [FIELD | {"name": "decision_time"}]}, "is repeated in the request"), ({"request": []}, "has no field"),
    ({"entity": ["carier"]}, "did you mean 'carrier'"), ({"output": [FIELD]}, "the output is carrier"),
    ({"unknown": 1}, "unknown"), ({"files": ["model"]}, "files"),
])  # fmt: skip
def test_a_value_that_cannot_be_right(folder, changed, says):
    manifest(folder, **changed)
    refused(folder, "bundle.json is damaged", says)


OUTSIDE = [
    "../outside",
    "/etc/hostname",
    "model/../../outside",
    "./samples.json",
    "",
    ".",
    "..",
    "a\0b",
    "..\\outside",
    "x" * 5000,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_that_leads_out_of_the_bundle(folder, name):
    (folder.parent / "outside").write_text("secret")
    names = json.loads((folder / "bundle.json").read_text())["files"]
    manifest(folder, files=names | {name: sha256(b"secret").hexdigest()})
    with pytest.raises(BundleError, match=r"is not a path inside it|cannot be read"):
        Bundle.load(folder)


def _link_to_a_file(folder):
    (folder.parent / "weights").write_bytes((weights := folder / "model/weights.safetensors").read_bytes())
    weights.unlink()
    weights.symlink_to(folder.parent / "weights")


def _link_to_a_folder(folder):
    (folder / "model").rename(folder.parent / "model")
    (folder / "model").symlink_to(folder.parent / "model")


@pytest.mark.parametrize(("change", "says"), [
    (_link_to_a_file, "is a link to a file outside it"),
    (_link_to_a_folder, "is a link to a file outside it"),
    (lambda folder: (folder / "model/weights.safetensors").symlink_to("weights.safetensors"), "is missing"),
    (lambda folder: (folder / "model/code.py").touch(), "model/code.py is not listed"),
    (lambda folder: (folder / "context/2100.snapshot").touch(), "context/2100.snapshot is not listed"),
    (lambda folder: (folder / "model/.hidden").touch(), "model/.hidden is not listed"),
    (lambda folder: (folder / "model/more").symlink_to("/etc"), "model/more is not listed"),
])  # fmt: skip
def test_links_that_lead_out_and_files_that_the_manifest_does_not_name(folder, change, says):
    if says == "is missing":
        (folder / "model/weights.safetensors").unlink()
    change(folder)
    refused(folder, says)


def test_what_a_desktop_or_a_store_leaves_beside_the_files_is_no_harm(folder):
    for name in (".gitignore", ".DS_Store", "model/.DS_Store"):
        (folder / name).touch()
    assert Bundle.load(folder).self_test() == 12


def test_a_snapshot_of_another_program_whose_checksum_is_right(folder):
    file = next((folder / "context").iterdir())
    file.write_bytes(b"other" + sha256(b"other").digest())
    names = json.loads((folder / "bundle.json").read_text())["files"]
    manifest(folder, files=names | {f"context/{file.name}": sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(BundleError, match="a snapshot in context/ cannot be read"):
        Bundle.load(folder).self_test()


@pytest.mark.parametrize(
    "content", [DEEP, b'{"champion": ' + DEEP + b"}", b"\xff", b'{"problem": "\xff"}', b"[]", b"NaN"]
)
def test_releases_and_routing_that_cannot_be_read(tmp_path, content, monkeypatch):
    (tmp_path / "releases.json").write_bytes(content)
    assert "cannot be read" in read_releases(tmp_path).problem
    monkeypatch.setenv("MLNB_SERVE_FROM", "models:/toy")
    monkeypatch.setenv("MLNB_MODEL_CACHE", str(tmp_path))
    routing = RoutingFile(default_settings())
    routing.path.parent.mkdir()
    routing.path.write_bytes(content)
    with pytest.raises(ServingError, match="cannot be read"):
        routing.read()


@pytest.mark.parametrize("position", [0, 60, -1])
def test_a_flipped_bit_in_the_weights(folder, position):
    weights = bytearray((file := folder / "model/weights.safetensors").read_bytes())
    weights[position] ^= 1
    file.write_bytes(weights)
    refused(folder, "model/weights.safetensors", "has changed since it was written")


def test_an_unknown_format(folder):
    manifest(folder, format=99)
    refused(folder, "format 99", "reads format 1")


@pytest.mark.parametrize("function", ["request_features", "context_features"])
def test_code_changed_since_training(folder, function):
    manifest(folder, **{function: {"name": f"toy.features.{function}", "fingerprint": "0" * 16}})
    refused(folder, f"trained with another toy.features.{function}")


def test_a_changed_source_is_noticed_and_a_comment_is_not(toy, tmp_path):
    project = shutil.copytree(toy, tmp_path / "project")
    load = ("-c", "from mlnb.models.bundle import Bundle; print(Bundle.load('products/bundle').self_test())")
    source = project / "toy/features.py"
    source.write_text(source.read_text().replace('"""What follows', '# a comment\n    """All that follows'))
    assert toy_project.run(project, *load).stdout == "12\n"
    source.write_text(source.read_text().replace("-3600", "-7200"))
    assert "trained with another toy.features.context_features" in toy_project.run(project, *load).stderr


def test_a_predictor_that_is_gone(folder):
    manifest(folder, predictor="toy.model.Forest")
    with pytest.raises(BundleError, match=r"'toy.model.Forest', which cannot be imported .* pip install -e"):
        Bundle.load(folder)


def test_the_self_test_names_sample_and_feature(toy, folder):
    bundle = Bundle.load(folder)
    original = bundle.model.request_features
    bundle.model.request_features = lambda request: (
        original(request) | {"hour": original(request)["hour"] + (request["flight"] == 103)}
    )
    with pytest.raises(BundleError, match=r"sample 3 gives hour = 7.0, the pipeline gave 6.0"):
        bundle.self_test()


def test_the_self_test_sees_the_last_bit_of_a_prediction(folder):
    bundle = Bundle.load(folder)
    predict = bundle.model.predict
    bundle.model.predict = lambda features: np.nextafter(predict(features), 1)
    with pytest.raises(BundleError, match="sample 0 gives probability"):
        bundle.self_test()


def test_one_row_and_many_give_the_same_bits(folder):
    bundle = Bundle.load(folder)
    request = columns_of(bundle.request, bundle.samples["requests"])
    newest, decisions = (
        bundle.sample_snapshots(),
        np.array([np.datetime64(r["decision_time"][:-1]) for r in bundle.samples["requests"]]),
    )
    for i, expected in enumerate(bundle.samples["outputs"]["probability"]):
        row = {name: column[i : i + 1] for name, column in request.items()}
        features = bundle.features(row, newest(decisions[i]).lookup(row))
        assert bundle.predict(features)[0] == expected


def test_writing_replaces_the_old_bundle_or_leaves_it_untouched(toy, folder):
    from toy.bundle import build, samples

    assert build(folder, "v2").version == "v2"
    wrong = samples()
    features = {
        k: np.array(v, dtype=np.str_ if k == "origin" else float)
        for k, v in Bundle.load(folder).samples["features"].items()
    }
    features["distance"] = features["distance"] + 1e-12
    with pytest.raises(BundleError, match="gives distance"):
        build(folder, "v3", samples=type(wrong)(wrong.requests, wrong.snapshots, features))
    with pytest.raises(BundleError, match="features have no column 'hour'"):
        build(folder, "v3", samples=type(wrong)(wrong.requests, wrong.snapshots, {"origin": features["origin"]}))
    assert Bundle.load(folder).version == "v2"
    assert [p.name for p in folder.parent.iterdir()] == ["bundle"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two folders do not change places in one step")
def test_whoever_is_killed_while_it_places_a_bundle_leaves_one(toy, folder):
    code = f"""
import os, shutil
from pathlib import Path
from toy.bundle import build
rename, rmtree = Path.rename, shutil.rmtree
Path.rename = lambda *a: (rename(*a), os.kill(os.getpid(), 9))
shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), 9)
build({str(folder)!r}, "v2")
"""
    assert toy_project.run(toy, "-c", code).returncode == -signal.SIGKILL
    assert Bundle.load(folder).version == "v2"


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("entity", ["carier"], "did you mean 'carrier'"),
        ("request", [Field("carrier", "text", "", "UA")], "write one of string, integer, number, time"),
        ("request_features", "toy.features.nothing", "cannot be imported"),
        ("numeric", ["hour", "backlogs"], "feature 'backlogs' is in neither"),
        ("samples", Samples({}, []), "the samples have no 'carrier'"),
        ("entity", "carrier", r"entity is 'carrier'; write a list of names: \['carrier'\]"),
        ("categorical", "origin", "write a list of names"),
        ("version", 1.1, "version is 1.1; write text of 1 to 250 printable characters"),
        ("version", "", "version is ''; write text"),
        ("name", "toy\n", "name is 'toy.n'; write text"),
        ("threshold", "high", "threshold is 'high'; write a number from 0 to 1"),
        ("threshold", None, "write a number from 0 to 1"),
        ("threshold", float("nan"), "write a number from 0 to 1"),
        (
            "training",
            {"model": object()},
            "training holds <object .*>, of type object; give texts, numbers, lists and dicts",
        ),
    ],
)
def test_wrong_arguments(toy, tmp_path, argument, value, says):
    from toy.bundle import build

    with pytest.raises(BundleError, match=says):
        build(tmp_path / "bundle", **{argument: value})
    assert not list(tmp_path.iterdir())


def _link(target: str):
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("make", [_link("nowhere"), _link("bundle"), _link("."), Path.touch, os.mkfifo])
def test_whatever_stands_in_the_place_of_a_bundle_is_replaced_and_no_link_is_followed(toy, tmp_path, make):
    from toy.bundle import build

    make(tmp_path / "bundle")
    assert build(tmp_path / "bundle").version == "v1"
    assert [(p.name, p.is_symlink()) for p in tmp_path.iterdir()] == [("bundle", False)]


def test_a_bundle_below_a_file_and_numbers_of_numpy_in_its_training(toy, tmp_path):
    from toy.bundle import build

    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="no bundle can be written in "):
        build(tmp_path / "file/bundle")
    scores = {"auc": np.float64(0.5), "by_fold": np.array([0.5, 0.25]), "rows": np.int64(3)}
    build(tmp_path / "bundle", training={"scores": scores})
    assert Bundle.load(tmp_path / "bundle").manifest.training == {
        "scores": {"auc": 0.5, "by_fold": [0.5, 0.25], "rows": 3}
    }


def test_records_and_columns_are_inverse(toy):
    from toy.bundle import REQUEST, samples

    columns = samples().requests
    back = columns_of(REQUEST, records_of(REQUEST, columns))
    assert all((back[f.name] == columns[f.name]).all() for f in REQUEST)
