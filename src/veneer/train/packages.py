"""Optional packages: asked for before work begins, with the command that installs them."""

from importlib.util import find_spec

from veneer.errors import MissingPackageError

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("transformers", "trl", "accelerate", "datasets", "pydantic", "yaml", "jinja2"),
    "plot": ("matplotlib",),
    "demo": ("transformers", "trl", "accelerate", "datasets", "pydantic", "yaml", "jinja2", "gguf", "matplotlib"),
}


def has(extra: str) -> bool:
    """Whether all packages of an extra are installed."""
    return all(find_spec(name) for name in EXTRAS[extra])


def require(extra: str) -> None:
    """Raise MissingPackageError naming what an extra lacks and how to install it."""
    missing = [name for name in EXTRAS[extra] if not find_spec(name)]
    if missing:
        raise MissingPackageError(
            f"This needs {', '.join(missing)}, not installed here. Install with: pip install 'veneer[{extra}]'"
        )
