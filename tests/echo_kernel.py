"""A kernel of another language for the tests: it shows each cell as it was sent, and fails where one says FAIL."""

import json
import sys
from pathlib import Path
from typing import ClassVar

from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel


class Echo(Kernel):
    implementation, implementation_version, banner = "echo", "1", "echo"
    language_info: ClassVar = {"name": "R", "mimetype": "text/plain", "file_extension": ".r"}

    def do_execute(self, code, silent, store_history=True, user_expressions=None, allow_stdin=False):
        if not silent:
            self.send_response(self.iopub_socket, "stream", {"name": "stdout", "text": code})
        if "FAIL" in code:
            error = {"ename": "Error", "evalue": "the cell says FAIL", "traceback": ["Error: the cell says FAIL"]}
            self.send_response(self.iopub_socket, "error", error)
            return {"status": "error", "execution_count": self.execution_count, **error}
        return {"status": "ok", "execution_count": self.execution_count, "payload": [], "user_expressions": {}}


def install(folder: Path, name: str = "ir", language: str = "R") -> None:
    "Put its kernelspec below `folder`, a folder of JUPYTER_PATH"
    spec = folder / "kernels" / name
    spec.mkdir(parents=True)
    argv = [sys.executable, __file__, "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, "language": language}))


if __name__ == "__main__":
    IPKernelApp.launch_instance(kernel_class=Echo)
