"What a bundle may name, and whose signature it needs"

import json
import pickle
import shutil
import subprocess
import sys
from hashlib import sha256
from textwrap import dedent

import pytest

from mlnb.models.bundle import Bundle
from mlnb.models.manifest import verify
from mlnb.models.trust import Trust, sign, trusted_function, trusted_point_in_time, trusted_predictor
from mlnb.models.watcher import verify_servable
from mlnb.project.errors import BundleError, SettingError
from mlnb.project.settings import load_settings

HANGAR = {
    "hangar/__init__.py": "",
    "hangar/__main__.py": "open('ran', 'w')",
    "hangar/code.py": """
        import functools
        import os
        from collections import OrderedDict
        from os import system
        from pathlib import Path
        from subprocess import Popen, run

        from freight import Joblib, features as theirs
        from mlnb.data.point_in_time import PointInTimeFeatures
        from mlnb.models.hooks import Model
        from mlnb.models.watcher import watch

        partial = functools.partial(os.system)
        method = Path("ran").write_text
        anonymous = lambda request: os.system("touch ran")
        write, also_run = open, run
        context, no_context, foreign_context = PointInTimeFeatures([]), {}, None

        def features(request):
            return request

        def made():
            def inner(request):
                return request
            return inner

        @functools.wraps(features)
        def decorated(request):
            return features(request)

        decorated.__qualname__ = "decorated"
        nested = made()
        wrapped = functools.wraps(features)(lambda request: request)

        class Renamed:
            pass

        Renamed.__module__, Renamed.__qualname__ = "subprocess", "Popen"

        class Trees(Model):
            def predict(self, features):
                return features["x"]

        class Own:
            @classmethod
            def load(cls, folder):
                return cls()
            def predict(self, features):
                return features["x"]

        class Inherited(Joblib):
            def predict(self, features):
                return features["x"]

        class Borrowed(Own):
            load = classmethod(Joblib.load.__func__)

        class Partial(Own):
            load = functools.partial(os.system)

        class Meta(type):
            def load(cls, folder):
                return cls()

        class OfMeta(metaclass=Meta):
            def predict(self, features):
                return features["x"]

        class NoPredict:
            @classmethod
            def load(cls, folder):
                return cls()
    """,
    "hangar/folder/evil.py": "open('ran', 'w')",
    "hangar/bundle/model/evil.py": "open('ran', 'w')\ndef features(request): return request",
    "hangar/bundle/own/__init__.py": "open('ran', 'w')",
    "freight.py": """
        import pickle

        def features(request):
            return request

        class Joblib:
            @classmethod
            def load(cls, folder):
                return pickle.loads((folder / "model").read_bytes())
    """,
    "evil.py": "open('ran', 'w')",
}


@pytest.fixture(scope="module")
def hangar(tmp_path_factory):
    "A folder with a trusted package, `hangar`, and another, `freight`; whatever must not run leaves a file `ran`"
    root = tmp_path_factory.mktemp("hangar")
    for name, text in HANGAR.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(dedent(text))
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


TRUST = Trust(("hangar",))

OUTSIDE = [
    "subprocess.Popen", "os.system", "builtins.exec", "evil.features", "freight.features", "numpy.log1p",
    "hangars.code.features",
    "mlnb.models.watcher.watch", "mlnb.project.files.write_whole",
]  # fmt: skip
NO_NAMES = [
    "hangar", "", ".", "..hangar.code.features", "hangar..code.features", "hangar.code.",
    ".hangar.code.features", "hangar.code:features",
    "hangar/code.features", "hangar.code.features()", "hangar．code.features", "ｈangar.code.features",
    "hangar.code.features\n",
    "hangar.__main__.run", "hangar.__init__.x", "hangar.code.__builtins__", "hangar.code.__dict__",
]  # fmt: skip
NOT_DEFINED = [
    "Popen",
    "run",
    "also_run",
    "system",
    "write",
    "partial",
    "method",
    "anonymous",
    "nested",
    "watch",
    "theirs",
]
MISSING = ["hangar.code.os.system", "hangar.nothing.features", "hangar.code.nothing", "hangar.code.Own.load"]


@pytest.mark.parametrize(
    "name", [*OUTSIDE, *NO_NAMES, *MISSING, *(f"hangar.code.{n}" for n in NOT_DEFINED), "hangar.bundle.own.x"]
)
def test_a_function_that_is_not_defined_in_trusted_code_is_refused(hangar, name):
    for check in (trusted_function, trusted_predictor, trusted_point_in_time):
        with pytest.raises(BundleError):
            check(name, TRUST, hangar / "hangar/bundle")


@pytest.mark.parametrize("name", ["hangar.bundle.model.evil.features", "hangar.bundle.own.x"])
def test_code_in_the_bundle_s_own_folder_is_not_even_imported(hangar, name):
    with pytest.raises(BundleError, match="is in the folder of the bundle itself"):
        trusted_function(name, TRUST, hangar / "hangar/bundle")


@pytest.mark.parametrize(
    "name", ["Inherited", "Borrowed", "Partial", "OfMeta", "NoPredict", "Renamed", "OrderedDict", "Path", "features"]
)
def test_a_class_whose_load_is_not_trusted_code_is_refused(hangar, name):
    with pytest.raises(BundleError, match=r"the bundle names .*; a bundle may name what"):
        trusted_predictor(f"hangar.code.{name}", TRUST)


def test_what_the_project_defines_may_be_named(hangar):
    assert trusted_function("hangar.code.features", TRUST)({"x": 1}) == {"x": 1}
    assert (
        trusted_function("hangar.code.theirs", Trust(("hangar", "freight"))).__module__ == "freight"
    )  # which is trusted, too
    assert trusted_function("hangar.code.decorated", TRUST)({"x": 1}) == {"x": 1}
    assert trusted_point_in_time("hangar.code.context", TRUST).views == ()
    assert trusted_predictor("hangar.code.Trees", TRUST).__name__ == "Trees" and trusted_predictor(
        "hangar.code.Own", TRUST
    )
    assert trusted_predictor("hangar.code.Inherited", Trust(("hangar", "freight")))
    assert trusted_predictor("mlnb.models.tabular.TabularPredictor", Trust())
    for name in ("no_context", "foreign_context", "features", "Own"):
        with pytest.raises(BundleError, match=r"which is not mlnb.data.point_in_time.PointInTimeFeatures"):
            trusted_point_in_time(f"hangar.code.{name}", TRUST)


def test_the_packages_of_a_project(tmp_path, monkeypatch):
    monkeypatch.delenv("MLNB_TRUSTED_PACKAGES")
    assert Trust.of_working_folder() == Trust()  # no project, nobody to trust
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "planes"\n[tool.mlnb]\ntrusted_packages = ["ourlib", "company.shared"]'
    )
    assert Trust.of_working_folder().packages == ("planes", "ourlib", "company.shared")
    assert Trust.of_working_folder().covers("company.shared.x") and not Trust.of_working_folder().covers(
        "company.other"
    )
    for wrong in ('["our lib"]', '["../x"]', '[""]', '"ourlib"', '["ourlib."]'):
        (tmp_path / "pyproject.toml").write_text(f"[tool.mlnb]\ntrusted_packages = {wrong}")
        with pytest.raises(SettingError, match="trusted_packages"):
            load_settings()


class Bomb:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("named", [
    {"request_features": {"name": "subprocess.Popen", "fingerprint": ""}},
    {"context_features": {"name": "subprocess.Popen", "fingerprint": ""}},
    {"predictor": "joblib.numpy_pickle"},
    {"predictor": "freight.Joblib"},
    {"predictor": "toy.bundle.write_bundle", "code": "0"},
])  # fmt: skip
@pytest.mark.parametrize("read", [Bundle.load, verify_servable])
def test_a_bundle_that_names_other_code_runs_none(toy, hangar, tmp_path, named, read):
    folder = shutil.copytree(toy / "products/bundle", tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text()) | named
    (folder / "model/model").write_bytes(pickle.dumps(Bomb()))
    manifest["files"]["model/model"] = sha256((folder / "model/model").read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="the bundle names"):
        read(folder)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    "Two SSH keys, and a file that allows the first"
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "signers").write_text(f'release@toy,ops@toy namespaces="mlnb-bundle" {(folder / "ours.pub").read_text()}')
    return folder


def _unsigned(folder, keys):
    (folder / "bundle.json.sig").unlink()


def _by_another_key(folder, keys):
    sign(folder / "bundle.json", keys / "theirs")


def _changed(folder, keys):
    (folder / "bundle.json").write_text((folder / "bundle.json").read_text().replace('"v1"', '"v2"'))


def _of_another_bundle(folder, keys):
    (folder / "other").write_text("{}")
    sign(folder / "other", keys / "ours")
    (folder / "other.sig").replace(folder / "bundle.json.sig")
    (folder / "other").unlink()


def _for_another_purpose(folder, keys):
    (folder / "bundle.json.sig").unlink()
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", keys / "ours", "-n", "git", folder / "bundle.json"], check=True
    )


def _garbage(folder, keys):
    (folder / "bundle.json.sig").write_bytes(b"\0\xff")


@pytest.mark.parametrize(
    "spoil", [_unsigned, _by_another_key, _changed, _of_another_bundle, _for_another_purpose, _garbage]
)
def test_a_bundle_that_is_not_signed_by_an_allowed_signer_is_refused(toy, tmp_path, keys, spoil):
    folder, trust = shutil.copytree(toy / "products/bundle", tmp_path / "bundle"), Trust(("toy",), keys / "signers")
    sign(folder / "bundle.json", keys / "ours")
    assert Bundle.load(folder, trust=trust).self_test() == 12
    spoil(folder, keys)
    with pytest.raises(BundleError, match="is not signed"):
        verify(folder, trust)


def test_the_pipeline_signs_and_every_reader_asks_for_it(toy, tmp_path, keys, monkeypatch):
    from toy.bundle import build

    monkeypatch.setenv("MLNB_BUNDLE_SIGNERS", str(keys / "signers"))
    build(tmp_path / "unsigned")
    for read in (Bundle.load, verify_servable, verify):
        with pytest.raises(
            BundleError,
            match="is not signed, and setting 'bundle_signers' requires it; sign it with: ssh-keygen -Y sign",
        ):
            read(tmp_path / "unsigned")
    monkeypatch.setenv("MLNB_BUNDLE_SIGNING_KEY", str(keys / "ours"))
    build(tmp_path / "signed")
    assert verify_servable(tmp_path / "signed").version == "v1"
    monkeypatch.setenv("MLNB_BUNDLE_SIGNERS", str(tmp_path / "nowhere"))
    with pytest.raises(BundleError, match="which does not exist"):
        Bundle.load(tmp_path / "signed")


def test_a_bento_finds_the_signers_that_were_packed_with_it(tmp_path, monkeypatch):
    source = tmp_path / "src"
    source.mkdir()
    (tmp_path / "bento.yaml").touch()
    (source / "pyproject.toml").write_text('[tool.mlnb]\npackage = "toy"\nbundle_signers = "allowed"\n')
    monkeypatch.chdir(source)
    assert Trust.of_working_folder().packages[0] == "toy" and Trust.of_working_folder().signers == source / "allowed"
    monkeypatch.setenv("MLNB_BUNDLE_SIGNERS", "/etc/allowed")
    assert str(Trust.of_working_folder().signers) == "/etc/allowed"


def test_wrong_settings_are_named_and_open_nothing(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\nbundle_signers = 3\n")
    with pytest.raises(SettingError, match="bundle_signers"):
        Trust.of_working_folder()
