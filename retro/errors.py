"""What is wrong, as types: the library says what it found, the command line adds the command that repairs it.

Every error that a user can cause derives from `RetroError`, and from `ValueError` or `OSError`, so that who catches
those catches these. Errors about a file carry its `path`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RetroError(Exception):
    """The base of all errors that bad input, bad files or a bad moment cause."""


class InvalidOption(RetroError, ValueError):
    """An option out of its range.

    * `name` is the option's, `value` what it was given
    * `reason` goes on with the sentence: "is not at least 1"
    """

    def __init__(self, name: str, value: Any, reason: str) -> None:
        self.name, self.value, self.reason = name, value, reason
        super().__init__(f"{name}={value!r:.80} {reason}")


class ArtifactError(RetroError):
    """Something is wrong with the file or folder at `path`."""

    def __init__(self, path: Path, message: str) -> None:
        self.path = path
        super().__init__(message)


class MissingArtifact(ArtifactError, FileNotFoundError):
    """There is no such file."""

    def __init__(self, path: Path, message: str = "") -> None:
        super().__init__(path, message or f"{path} does not exist")


class DamagedFile(ArtifactError, ValueError):
    """A file that is torn, altered, or not what retro writes; `reason` goes on with the sentence after its path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, f"{path} {reason}")


class StaleArtifact(ArtifactError, ValueError):
    """An artifact that is whole, but was made otherwise than is wanted.

    * `differences` has, for each field that differs, what was found and what is wanted
    * `wanted` has all fields that were compared
    * `what` says what else differs, where a hash would say nothing
    """

    def __init__(
        self,
        path: Path,
        differences: Mapping[str, tuple[Any, Any]],
        wanted: Mapping[str, Any] | None = None,
        what: str = "",
    ) -> None:
        self.differences, self.wanted = dict(differences), dict(wanted or {})
        said = "; ".join(filter(None, [what, phrase(self.differences)]))
        super().__init__(path, f"{path} was made with {said}")


class UnfinishedUpdate(ArtifactError, ValueError):
    """Documents were added to or removed from a corpus, and its index does not follow yet."""


class CannotWrite(ArtifactError, OSError):
    """A file or folder that the system does not let us write."""


class CannotRead(ArtifactError, OSError):
    """A text file, or a folder of them, that the system does not let us read."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(path, f"cannot read {path}: {error.strerror or error}; make it readable, or leave it out")


class FolderInUse(ArtifactError, BlockingIOError):
    """Another process writes into the folder."""


class LostProcess(RetroError, TimeoutError):
    """Another process of the same command gives no sign of life."""


class TextTooShort(RetroError, ValueError):
    """There is not enough text for a single sample."""


class EmptyDatabase(RetroError, ValueError):
    """No document would be left to retrieve from."""


class NameTaken(RetroError, ValueError):
    """The database has another version of a document `name` that is to be added."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"the database has another version of {name}; take that out first, or rename the file")


class MissingDataOfRun(MissingArtifact):
    """The data that a run was made with are not where they were."""


class UntrustedPath(ArtifactError, ValueError):
    """A file names a folder that is not below the current one; who trusts it has to name it."""


class SeenText(RetroError, ValueError):
    """Text to be evaluated was trained on, or can be retrieved; or text to be added is held out."""


def phrase(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences in words."""
    return "; ".join(
        f"{name}={found!r}, but {name}={wanted!r} is wanted" for name, (found, wanted) in differences.items()
    )


def differences(manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """For each wanted field that a manifest does not have with this value: what it has, and what is wanted."""
    return {name: (manifest.get(name), value) for name, value in wanted.items() if manifest.get(name) != value}


def require_match(path: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `StaleArtifact` naming both values of each field in which a manifest differs from what is wanted."""
    if different := differences(manifest, wanted):
        raise StaleArtifact(path, different, wanted)
