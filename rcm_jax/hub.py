"""Weights on the Hugging Face hub: `org/name` and `hf://org/name@revision/file` where a path is expected.

    find("Wan-AI/Wan2.1-T2V-1.3B", "dit_path")                   # the folder as it is published, nothing fetched yet
    find("hf://worstcoder/rcm-Wan/rCM_Wan2.1_T2V_1.3B_480p.pt").fetch()    # a file, its path in the cache

What is local comes first. huggingface_hub asks, fetches, keeps and shows its progress, with its environment variables
(HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE); its errors become one line that names the argument.
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote, unquote

from rcm_jax.errors import ArgumentError, MissingFileError

MAIN = "main"
FORMS = "hf://org/name, hf://org/name/file or hf://org/name@revision/file"
ADDRESS = re.compile(r"hf://?(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(/(?P<inside>.*))?")
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
OF_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json", ".model")  # folder/file.pt is not org/name


@dataclasses.dataclass(frozen=True)
class Published:
    """A file or folder of a repository, used like a `Path`; `fetch` gives the local one.

    inside: where in the repository, "" for all of it. named: what the caller wrote, as `argument` where it has a name.
    """

    repo: str
    revision: str = MAIN
    inside: str = ""
    named: str = ""
    argument: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision == MAIN else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repo}{at}" + (f"/{self.inside}" if self.inside else "")

    def __truediv__(self, name: str | Path) -> "Published":
        return dataclasses.replace(self, inside="/".join(PurePosixPath(self.inside, name).parts))

    @property
    def parent(self) -> "Published":
        return dataclasses.replace(self, inside="/".join(PurePosixPath(self.inside).parts[:-1]))

    @property
    def name(self) -> str:
        return PurePosixPath(self.inside).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.inside).suffix

    @property
    def commit(self) -> str:
        """What the revision is now."""
        return _listing(self).commit

    def absolute(self) -> "Published":
        return self

    def files(self) -> list[str]:
        """What a folder holds, names below it."""
        start = f"{self.inside}/" if self.inside else ""
        return [name.removeprefix(start) for name in _listing(self).names if name.startswith(start)]

    def is_file(self) -> bool:
        return self.inside in _listing(self).names

    def is_dir(self) -> bool:
        return not self.is_file() and bool(self.files())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def read_text(self) -> str:
        return self.fetch().read_text()

    def cached(self) -> Path | None:
        """The file in the cache; None where it must be fetched."""
        found = _hub(self).try_to_load_from_cache(self.repo, self.inside, revision=_listing(self).commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, names: Sequence[str] | None = None) -> Path:
        """Where it is in the cache, once it is there: the file; of a folder the files named, or all."""
        wanted = [self] if self.is_file() else [self / name for name in (self.files() if names is None else names)]
        if all(place.cached() for place in wanted) and wanted:
            return wanted[0].cached() if self.is_file() else _above(wanted[0].cached(), wanted[0], self)
        patterns = [glob.escape(place.inside) for place in wanted]
        with _told(self):
            root = _hub(self).snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns)
        return Path(root, self.inside)

    def header(self) -> Any:
        """Of a safetensors file, nothing else fetched: `metadata` and `tensors`, name -> `shape`, `dtype`."""
        with _told(self):
            return _hub(self).HfApi().parse_safetensors_file_metadata(self.repo, self.inside, revision=self.revision)

    def wrong(self, words: str, kind: type[ArgumentError] = ArgumentError) -> ArgumentError:
        """An error about it, named as the caller named it."""
        if self.argument is None:
            return kind(f"{self.named or self}: {words}")
        return kind(f"{{{self.argument}}}: {words}", **{self.argument: self.named or self})


Place = Path | Published


def find(path: str | os.PathLike | Published, argument: str | None = None) -> Place:
    """What a path of weights means: what is there, else on the hub where it has that form, else the path for its reader
    to refuse; a `Path` is a local one. Raises ArgumentError that names the `argument` for a repository, revision or
    file that cannot be had."""
    if isinstance(path, (Path, Published)):
        return path
    text = os.fspath(path)
    if text.startswith("hf:/"):
        if not (parts := ADDRESS.fullmatch(text)):
            raise Published("", named=text, argument=argument).wrong(f"an address on the hub is {FORMS}")
        revision, inside = unquote(parts["revision"] or MAIN), (parts["inside"] or "").strip("/")
        place = Published(parts["repo"], revision, inside, text, argument)
    elif not os.path.exists(text) and NAME.fullmatch(text) and not text.endswith(OF_FILES):
        place = Published(text, named=text, argument=argument)
    else:
        return Path(path)
    if not place.exists():
        if error := _listing(place).unreached:
            _tell(place, error)
        has = ", ".join(name for name in _listing(place).names[:12] if not name.startswith("."))
        raise place.wrong(f"{place.repo} has no {place.inside}; it has {has or 'no files'}, …", MissingFileError)
    return place


def unreached(*places: Place) -> str:
    """In brackets, why only what the cache has of them is known; empty where the hub answered."""
    errors = [(place, _listing(place).unreached) for place in places if isinstance(place, Published)]
    return next((f" ({_unreached(_hub(place), error)})" for place, error in errors if error), "")


def fetched(path: str | os.PathLike | Published, names: Sequence[str] | None = None) -> Path:
    """The local path of a `Place`, fetched where it is on the hub (`Published.fetch`)."""
    place = find(path)
    return place.fetch(names) if isinstance(place, Published) else place


class _Listing(NamedTuple):
    """Of a revision. unreached: why it is of the cache alone."""

    commit: str
    names: tuple[str, ...]
    unreached: Exception | None = None


def _listing(place: Published) -> _Listing:
    with _told(place):
        return _ask(_hub(place), place.repo, place.revision)


@functools.cache  # a run sees one state of the repository
def _ask(hub: ModuleType, repo: str, revision: str) -> _Listing:
    """Of the hub, or, where it does not answer, of what the cache has."""
    try:
        info = hub.HfApi().model_info(repo, revision=revision)
        return _Listing(info.sha, tuple(sorted(file.rfilename for file in info.siblings)))
    except Exception as error:  # also of whichever HTTP library huggingface_hub has
        if _status(error, 500) < 500 or isinstance(error, hub.errors.HFValidationError):
            raise
        failure = error
    try:
        root = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except hub.errors.LocalEntryNotFoundError:
        raise failure from None
    return _Listing(root.name, _inside(root), failure)


def _inside(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))


def _above(path: Path, file: Published, folder: Published) -> Path:
    """The local folder of a local file in it."""
    depth = len(PurePosixPath(file.inside).parts) - len(PurePosixPath(folder.inside).parts)
    return path.parents[depth - 1]


def _hub(place: Published) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise place.wrong(f"{_not_here(place)}fetching it needs huggingface_hub: pip install -e '.[hub]'") from error
    return huggingface_hub


def _not_here(place: Published) -> str:
    return "" if place.named.startswith("hf:/") else "there is no such file or folder here; "


@contextlib.contextmanager
def _told(place: Published) -> Iterator[None]:
    """huggingface_hub's errors become one line each."""
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:
        _tell(place, error)


def _tell(place: Published, error: Exception) -> NoReturn:
    hub = _hub(place)
    known, site = hub.errors, hub.constants.ENDPOINT
    status = _status(error)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    kind = ArgumentError
    if isinstance(error, known.GatedRepoError):
        words = f"the repository is gated: ask for access at {site}/{place.repo}, then {login}"
    elif isinstance(error, known.RepositoryNotFoundError):
        words = f"{_not_here(place)}{site} has no repository {place.repo} ({status}); if it is a private one, {login}"
        kind = MissingFileError
    elif isinstance(error, known.RevisionNotFoundError):
        words, kind = f"{place.repo} has no revision {place.revision!r}", MissingFileError
    elif isinstance(error, known.HFValidationError):
        words = f"{place.repo!r} is no name of a repository; an address on the hub is {FORMS}"
    elif status in (401, 403):
        words = f"{site} refuses ({status}): {login}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        words = f"no room for it in {hub.constants.HF_HUB_CACHE}: HF_HOME moves the cache, `hf cache` tidies it"
    elif isinstance(error, PermissionError):
        words = f"{hub.constants.HF_HUB_CACHE} cannot be written: HF_HOME moves the cache"
    elif "onsistency check" in str(error):
        words = "what came is not as long as the hub says: the same command again fetches it anew"
    elif isinstance(error, known.SafetensorsParsingError):
        words = f"{place.inside} is not a whole safetensors file"
    elif isinstance(error, known.LocalEntryNotFoundError) or status is None:
        words = f"{_not_here(place)}{_unreached(hub, error)}; {_kept(hub, place)}"
    else:
        words = f"{site} answers {status}: {_line(error)}"
    raise place.wrong(words, kind) from error


def _unreached(hub: ModuleType, error: Exception) -> str:
    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so nothing is fetched"
    cause = error.__cause__ if isinstance(error, hub.errors.LocalEntryNotFoundError) and error.__cause__ else error
    return f"{hub.constants.ENDPOINT} cannot be reached ({type(cause).__name__}: {_line(cause)})"


def _kept(hub: ModuleType, place: Published) -> str:
    """What the cache has of a repository, in any revision."""
    folder = Path(hub.constants.HF_HUB_CACHE, "models--" + place.repo.replace("/", "--"), "snapshots")
    names = sorted({name for root in folder.glob("*") for name in _inside(root)})
    return (
        f"the cache has {', '.join(names)}" if names else f"the cache ({hub.constants.HF_HUB_CACHE}) has nothing of it"
    )


def _status(error: Exception, default: int | None = None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", default)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
