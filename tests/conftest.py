import signal
import sys

import pytest

# A shell that starts the tests in the background makes its children ignore Ctrl-C; the programs under test must not inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    "A tiny project with its bundle; its package can be imported. Read it, copy it, do not change it"
    import toy_project

    root = toy_project.make(tmp_path_factory.mktemp("toy") / "project")
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
