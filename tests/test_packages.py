"""Which distribution is behind a module, in folders of packages that are made here."""

import os

import pytest

from mlnb.pipelines import packages
from mlnb.pipelines.packages import PackageIndex


@pytest.fixture
def site(tmp_path, monkeypatch):
    "A function that installs a distribution into a made-up folder of packages"
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(packages, "site_packages", lambda: [str(folder)])

    def install(name, version, kind="dist-info", **files):
        information = folder / f"{name}-{version}.{kind}"
        information.mkdir()
        for file, text in files.items():
            (information / file.replace("_txt", ".txt")).write_text(text)
        os.utime(folder)

    install.folder = folder
    return install


def test_names_and_lists(site):
    site("pandas", "3.1.1")
    site("scikit_learn", "1.6", RECORD="sklearn/__init__.py,sha256=x,1\nscikit_learn-1.6.dist-info/RECORD,,\n")
    site("PyYAML", "6.0", top_level_txt="_yaml\nyaml\n")
    site("six", "1.17", RECORD="six.py,,\n")
    site("old_tool", "2.0-py3.11", kind="egg-info", top_level_txt="tool\n")
    site("google_a", "1", RECORD="google/a/__init__.py,,\n")
    site("google_b", "2", RECORD="google/b/__init__.py,,\n")
    found = PackageIndex().versions(["pandas", "sklearn", "yaml", "six", "tool", "google", "json", "os", "absent"])
    assert found == {
        "google-a": "1", "google-b": "2", "old-tool": "2.0", "pandas": "3.1.1", "pyyaml": "6.0", "scikit-learn": "1.6",
        "six": "1.17",
    }  # fmt: skip


def test_of_two_versions_in_a_folder_one_counts_in_whichever_order_they_are_listed(site, monkeypatch):
    site("six", "1.16")
    site("six", "1.17")
    names, found = os.listdir(site.folder), []
    for turned in (names, names[::-1]):
        monkeypatch.setattr(packages.os, "listdir", lambda place, turned=turned: list(turned))
        found.append(PackageIndex().versions(["six"]))
    assert found == [{"six": "1.16"}] * 2


def test_an_upgrade_is_seen_and_nothing_else_is_read_again(site, monkeypatch):
    site("pandas", "3.1.1")
    site("scikit_learn", "1.6", top_level_txt="sklearn")
    memory = {}
    assert PackageIndex(memory).versions(["pandas", "sklearn"]) == {"pandas": "3.1.1", "scikit-learn": "1.6"}
    with monkeypatch.context() as m:
        m.setattr(packages, "installed_distributions", None)
        m.setattr(packages, "distributions_by_module", None)
        assert PackageIndex(memory).versions(["sklearn"]) == {"scikit-learn": "1.6"}
    again = PackageIndex(memory)
    (site.folder / "pandas-3.1.1.dist-info").rename(site.folder / "pandas-3.1.2.dist-info")
    os.utime(site.folder, (1, 1))
    again.refresh()
    assert again.versions(["pandas"]) == {"pandas": "3.1.2"}


def test_damaged_memory_and_no_folders(site, monkeypatch):
    site("pandas", "3.1.1")
    assert PackageIndex({"times": 3, "have": 4}).versions(["pandas"]) == {"pandas": "3.1.1"}
    monkeypatch.setattr(packages, "site_packages", list)
    assert PackageIndex().versions(["pandas", "mlnb"]) == {"mlnb": packages.mlnb.__version__}
