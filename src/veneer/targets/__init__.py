"""From names to sites: which layers a config means.

Reads a model's structure, even on the meta device; changes nothing.
"""

from veneer.targets.match import Resolution, resolve
from veneer.targets.preview import Preview, preview
from veneer.targets.site import Site
from veneer.targets.token_rows import TokenSite

__all__ = ["Preview", "Resolution", "Site", "TokenSite", "preview", "resolve"]
