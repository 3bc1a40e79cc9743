"""What a video's file says of itself: title and comment."""

from pathlib import Path


def read_tags(path: str | Path) -> dict[str, str]:
    """Of an MP4, GIF or PNG. Raises FileNotFoundError, or ValueError for what is none of them."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no video at {path}")
    try:
        tags = _of_container(path) if path.suffix == ".mp4" else _of_picture(path)
    except (OSError, SyntaxError, ValueError) as error:  # what PyAV and Pillow raise over other files
        raise ValueError(f"{path} is not an MP4, GIF or PNG that can be read: {error}") from error
    return {name.lower(): text for name, text in tags.items()}


def _of_container(path: Path) -> dict[str, str]:
    import av

    with av.open(path.absolute()) as file:  # FFmpeg takes what stands before a colon for a protocol
        return dict(file.metadata)


def _of_picture(path: Path) -> dict[str, str]:
    from PIL import Image

    with Image.open(path) as image:
        image.load()  # text may stand behind the pixels
        found = {name: image.info.get(name) for name in ("Title", "Comment", "comment")}
    texts = {name: text.decode() if isinstance(text, bytes) else text for name, text in found.items()}
    return {name: str(text) for name, text in texts.items() if text is not None}
