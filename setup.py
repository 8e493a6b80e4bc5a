"""The wheel carries the pieces of the reference project, so that `mlnb new` works without a checkout; all else is in
pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
sys.path.insert(0, str(here))
from mlnb.project.template import template_files


class BuildWithTemplate(build_py):
    """Copies every file of the template to mlnb/template/ of the build, by the path it has here."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for source in template_files(here):
            target = Path(self.build_lib, "mlnb", "template", source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / source, target)


setup(cmdclass={"build_py": BuildWithTemplate})
