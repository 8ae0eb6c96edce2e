"""A score folder beside the pairs that it was made of."""

import os
from collections.abc import Iterator

from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.rows import BadRows, source_hash
from adaptrm.data.scores import Batch, read_batches, read_manifest
from adaptrm.errors import InputError


def pairs_of(folder: str | os.PathLike, pairs: str | None = None) -> str:
    """Where the pairs of a score folder lie.

    Args:
        pairs: where they lie now; None takes the manifest's word.

    Raises:
        InputError: no such pairs, or they are not those that were scored.
    """
    manifest = read_manifest(folder)
    source = pairs or manifest["pairs"]
    try:
        found = source_hash(source)
    except InputError as wrong:
        moved = "" if pairs else "; it was scored under this name: give --pairs with where it lies now"
        raise InputError(f"{wrong}{moved}") from None
    if found != manifest["pairs_sha256"]:
        raise InputError(
            f"{source}: not the pairs that {folder} was made of (SHA-256 {found[:12]}..., there "
            f"{manifest['pairs_sha256'][:12]}...); give --pairs with the file that was scored, or score again"
        )
    return source


def read_scored(
    folder: str | os.PathLike, source: str, with_mass: bool = False, chosen: bool = False
) -> Iterator[tuple[Batch, list[Pair]]]:
    """The batches of a finished score folder, each with its pairs; memory does not depend on their number.

    Args:
        source: what ``pairs_of`` says.
        with_mass, chosen: as ``read_batches``.

    Raises:
        InputError: folder and pairs do not hold the same ids, or one of them cannot be read.
    """
    manifest = read_manifest(folder)
    # Rows that were skipped when the pairs were scored are skipped again; score listed them.
    bad = BadRows(manifest.get("on_bad_row", "fail"), listed=False)
    lenient = bad.on_bad_row == "skip" and manifest.get("truncate_to") is not None  # some could not be cut so far
    stream = read_pairs(source, bad, ids_checked=bad.on_bad_row == "fail")

    def found(name: str) -> Pair:
        pair = next(stream, None)
        while lenient and pair is not None and pair.id != name:
            pair = next(stream, None)
        if pair is None:
            raise InputError(f"{folder}: holds more rows than {source} has pairs; score again")
        if pair.id != name:
            raise InputError(f"{folder}: pair {name!r} is {pair.id!r} in {source}; score again")
        return pair

    for scores in read_batches(folder, with_mass, chosen):
        yield scores, [found(name) for name in scores.ids]
    if not lenient and next(stream, None) is not None:
        raise InputError(f"{folder}: holds fewer rows than {source} has pairs; score again")
