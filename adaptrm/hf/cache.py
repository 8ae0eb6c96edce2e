"""Models at remote addresses, copied to this machine."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.progress import say

# What a model folder is read for; its card states the license. Names come from outside: none leads out of the cache.
WANTED = re.compile(r"tokenizer\.model|merges\.txt|README\.md|\w[\w.-]*\.(json|safetensors|jinja)", re.ASCII)


def cache_folder() -> Path:
    """``ADAPTRM_CACHE``, or ``adaptrm`` in the user's cache folder."""
    given = os.environ.get("ADAPTRM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptrm"


def local_copy(folder: str | os.PathLike) -> Path:
    """A folder of a model or tokenizer on this machine; a remote one is copied once, and again when a file changes.

    Raises:
        InputError: it holds no such files, or cannot be read.
    """
    if paths.is_local(folder):
        return paths.here(folder)
    versions = {name: version for name, version in paths.files(folder).items() if WANTED.fullmatch(name)}
    if not versions:
        raise InputError(f"{folder}: holds no files of a model or tokenizer; check the address")
    key = hashlib.sha256(json.dumps([str(folder), sorted(versions.items())]).encode()).hexdigest()[:24]
    readable = re.sub(r"[^\w.-]+", "-", str(folder).partition("://")[2], flags=re.ASCII).strip("-.")[-60:]
    copies = cache_folder() / "models"
    copy = copies / f"{readable}-{key}"
    if copy.is_dir():
        return copy
    paths.make_dir(copies)
    say(f"copying {folder} to {copy}")
    with paths.told(copies, *paths.WRITE):
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=copies))
        try:
            paths.fetch(folder, versions, partial)
            partial.rename(copy)
        except OSError:
            if not copy.is_dir():  # else another process has made it meanwhile
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return copy
