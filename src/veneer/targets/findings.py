"""What is wrong with a config for one model, collected so that it can be said at once."""

import warnings
from dataclasses import dataclass, field

from veneer.errors import TargetError, VeneerWarning, bullet_list


@dataclass
class Findings:
    """Sentences about settings that do not fit a model.

    idle    settings that match nothing and so change nothing
    wrong   settings that cannot be followed
    """

    idle: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def settle(self, model_name: str, *, strict: bool) -> None:
        """Raise TargetError if anything was found. If not `strict`, idle settings alone are only warned of."""
        found = [*self.idle, *self.wrong]
        if self.wrong or (strict and self.idle):
            raise TargetError(bullet_list(f"{_settings(len(found))} not fit {model_name}:", found))
        if self.idle:
            headline = f"{_settings(len(found))} not fit {model_name} and are passed over:"
            warnings.warn(bullet_list(headline, found), VeneerWarning, stacklevel=5)


def _settings(count: int) -> str:
    return "1 setting does" if count == 1 else f"{count} settings do"
