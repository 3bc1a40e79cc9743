"""Files of prompts, one a line."""

from collections.abc import Sequence
from pathlib import Path

from rcm_jax.errors import ArgumentError


def read_prompts_file(path: str | Path, argument: str) -> list[str]:
    """The lines without white space around them, empty ones dropped. Raises ArgumentError that names the `argument` for
    a path that is no file and a file that is not UTF-8, by its line, or has no prompts."""
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ArgumentError(f"{{{argument}}} is {what}: name a file", **{argument: path})
    try:
        text = read_text(path)
    except ValueError as error:
        raise ArgumentError(f"{{{argument}}}, {error}", **{argument: path}) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ArgumentError(f"{{{argument}}} has no prompts", **{argument: path})
    return prompts


def read_text(path: Path) -> str:
    """Of a UTF-8 file. Raises ValueError that names the line which is not, without the file's name."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        written = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise ValueError(
            f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8, and the file is likely {written}; "
            f"iconv -f {written} -t UTF-8 {path} > utf8.txt converts it"
        ) from error


def given_prompts(prompt: str | Sequence[str] | None, path: str | Path | None) -> str | Sequence[str] | None:
    """Of a command's --prompt or --prompts_file. Raises ValueError for both, or as `read_prompts_file`."""
    if path is None:
        return prompt
    if prompt is not None:
        raise ValueError("give --prompt or --prompts_file, not both")
    return read_prompts_file(path, "prompts_file")
