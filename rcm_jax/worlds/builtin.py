"""The networks that come with the package."""

from pathlib import Path

from rcm_jax.hub import Place, find

BUILTIN = {
    name: Path(__file__).parent / "toy" / file
    for name, file in {"toy": "teacher.safetensors", "toy_causal": "causal_student.safetensors"}.items()
}


def find_model(name: str | Place, argument: str | None = None) -> Place:
    """`toy` is the built-in world's teacher, `toy_causal` its causal student; they come with the package. Anything else
    is a path, or on the hub (`hub.find`). Raises FileNotFoundError where the package lacks the file."""
    path = BUILTIN.get(str(name))
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"this copy of the package has no {path.name}, which {str(name)!r} stands for: {path}")
    return path or find(name, argument)
