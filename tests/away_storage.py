"""A storage that can be made to fail or to hang while a service uses it: fsspec's protocol `away`, over a folder of
the disk."""

import os
import time
from pathlib import Path

from fsspec import AbstractFileSystem, register_implementation


class EndpointConnectionError(Exception):
    "As botocore's, which has bases of its own"


class ClientError(Exception):
    "As botocore's and aiohttp's"


class HttpError(Exception):
    "As gcsfs's"


class NoCredentialsError(ValueError):
    "As of libraries that check what they are given"


ERRORS = {e.__name__: e for e in (EndpointConnectionError, ClientError, HttpError, NoCredentialsError)}
ERRORS |= {
    e.__name__: e for e in (PermissionError, TimeoutError, ConnectionResetError, ImportError, RuntimeError, EOFError)
}


class Away(AbstractFileSystem):
    "A folder that does what the file in AWAY_MODE says: nothing unusual, `hang`, or raise the error of that name"

    protocol, cachable = "away", False

    def _obey(self):
        file = Path(os.environ["AWAY_MODE"])
        while (mode := file.read_text()) == "hang":
            time.sleep(0.05)
        if mode:
            raise ERRORS[mode](f"the storage says {mode}")

    def ls(self, path, detail=True, **_):
        self._obey()
        entries = [{"name": f"{path}/{n}", "size": 0, "type": "file"} for n in os.listdir(path)]
        return entries if detail else [info["name"] for info in entries]

    def find(self, path, detail=False, **_):
        self._obey()
        return {} if detail else []

    def cat_file(self, path, **_):
        self._obey()
        return Path(path).read_bytes()

    def pipe_file(self, path, value, **_):
        self._obey()
        Path(path).write_bytes(value)

    def rm_file(self, path):
        self._obey()
        os.remove(path)

    def _open(self, path, mode="rb", **_):
        self._obey()
        return open(path, mode)

    def makedirs(self, path, exist_ok=False):
        self._obey()
        os.makedirs(path, exist_ok=exist_ok)


register_implementation("away", Away, clobber=True)
