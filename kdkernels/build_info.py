"""The record of a build: the compiled libraries, their tools, and why not more were built; and where to find them.

setup.py writes it to ``_build_info.json`` beside the package. This file needs the standard library only, and nothing of
the package: setup.py loads it by its path, where no torch need be.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

PACKAGE = Path(__file__).resolve().parent
FILE = "_build_info.json"
# By backend: the library's name, and what it is called in a message.
LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}
WORDS = {"cpu": "the C++ extension (CPU kernels)", "cuda": "the CUDA extension"}


def source_hash(root: Path) -> str:
    """Of all that a library and this package must agree on: the native sources, and the schemas that they implement."""
    digest = hashlib.sha256()
    native = [path for suffix in ("h", "cpp", "cu", "cuh") for path in (root / "csrc").rglob(f"*.{suffix}")]
    for name in sorted(path.relative_to(root).as_posix() for path in [*native, root / "kdkernels" / "ops.py"]):
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def read(package: Path = PACKAGE) -> dict[str, Any]:
    """The record beside a package, or an empty one."""
    try:
        return json.loads((package / FILE).read_text())
    except (OSError, ValueError):
        return {}


def source_tree(package: Path = PACKAGE) -> Optional[Path]:
    """The folder of the sources that the package stands in, or None where it was installed."""
    root = package.parent
    return root if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None


def beside(package: Path, backend: str) -> Optional[Path]:
    """The library in the folder of a package, or None where it was not built."""
    found = sorted(package.glob(f"{LIBRARIES[backend]}.*"))
    return next((path for path in found if path.suffix in (".so", ".dylib", ".pyd")), None)


@functools.cache
def find(backend: str, package: Path = PACKAGE) -> Optional[Path]:
    """The library of a backend, or None.

    A source tree in which nothing was built hides an installed package when Python starts in it. It borrows the library
    of that one, where the two agree on what is compiled.
    """
    path = beside(package, backend)
    root = source_tree(package)
    if path is not None or root is None or read(package):
        return path
    for other in installed(package):
        path = beside(other, backend)
        if path is not None and read(other).get("sources") == source_hash(root):
            return path
    return None


def installed(package: Path = PACKAGE) -> Iterator[Path]:
    """The folders of other installations of the package that Python could import here."""
    seen = {package}
    for distribution in importlib.metadata.distributions(name="kdkernels"):
        folder = _folder(distribution)
        if folder not in seen and (folder / FILE).is_file():
            yield folder
        seen.add(folder)


def installed_version(package: Path = PACKAGE) -> Optional[str]:
    """The version that pip lists for a package, with its label; None where pip did not install it."""
    for distribution in importlib.metadata.distributions(name="kdkernels"):
        # A build in place leaves metadata without an installer in the source tree, and a later build does not renew it.
        if distribution.read_text("INSTALLER") is not None and _folder(distribution) == package:
            return distribution.version
    return None


def why_missing(backend: str, package: Path = PACKAGE) -> str:
    """Why there is no library of a backend, and the command that makes one."""
    root, record, what = source_tree(package), read(package), WORDS[backend]
    part = record.get(backend, {})
    cure = part.get("cure", "")
    if part.get("built"):
        reason = f"{what} was built, but is no longer in {package}"
    elif part:
        reason = f"{what} was not built: {part['reason']}"
    elif root is not None:
        reason = f"{what} was not built in the source tree {root}"
        others = [other for other in installed(package) if beside(other, backend) is not None]
        if others:
            reason += f", which hides the one installed in {others[0]} and differs from the sources of that one"
            cure = "leave the source tree, or"
    else:
        reason = f"{what} was not built, and there is no record why"
    return f"{reason}. To have it: {f'{cure} ' if cure else ''}{rebuild_command(backend, package)}"


def rebuild_command(backend: str, package: Path = PACKAGE) -> str:
    """A sentence's end with the command line that builds the library of a backend, or fails and says why."""
    import shlex  # of use in this sentence alone, and not where the library loads

    command = f"KDKERNELS_BUILD={backend} {shlex.quote(os.path.normpath(sys.executable))} -m pip install --no-deps"
    root = source_tree(package)
    if root is not None:
        return f"run `{command} -e {shlex.quote(str(root))}`"
    # pip keeps the wheels of fixed commits, also those without kernels.
    command += " --force-reinstall --no-cache-dir"
    source = installed_from(package)
    return f"run `{command} {shlex.quote(source)}`" if source else f"run `{command} .` in the folder of the sources"


def installed_from(package: Path) -> Optional[str]:
    """The place that pip installed the package from, as pip wants to be told; None for a wheel, or an unknown place."""
    for distribution in importlib.metadata.distributions(name="kdkernels", path=[str(package.parent)]):
        origin = _origin(distribution)
        url = origin.get("url", "")
        if "vcs_info" in origin:
            vcs = origin["vcs_info"]
            return f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
        if "dir_info" in origin:
            folder = _local(url)
            return str(folder) if (folder / "setup.py").is_file() else None
        if url and not url.endswith(".whl"):
            return url
    return None


def _folder(distribution: importlib.metadata.Distribution) -> Path:
    """The folder of the package that a distribution makes Python import."""
    origin = _origin(distribution)
    if origin.get("dir_info", {}).get("editable"):
        return (_local(origin["url"]) / "kdkernels").resolve()
    return Path(str(distribution.locate_file("kdkernels"))).resolve()


def _origin(distribution: importlib.metadata.Distribution) -> dict[str, Any]:
    try:
        return json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}


def _local(url: str) -> Path:
    return Path(urllib.request.url2pathname(urllib.parse.urlparse(url).path))


def summary(backend: str, record: dict[str, Any]) -> str:
    """The record of a library that was built, in a line."""
    part = record.get(backend, {})
    if not part.get("built"):
        return "there is no record of how it was built"
    return f"{', '.join(part['targets'])}; by {part['compiler']} against torch {part['torch']}"
