"""What went wrong between here and the Hugging Face hub, in a sentence or two that say what to do."""

from collections.abc import Mapping
from typing import Any

_NO_CONNECTION = "cannot be reached"
_LOG_IN = "log in with `hf auth login` or pass token="


def failures() -> tuple[type[BaseException], ...]:
    """Every error that reading from the hub or writing to it raises by itself."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # HfHubHTTPError stands on the base of its HTTP client's errors, which differs from version to version; those of a
    # broken connection have no other base. RuntimeError: an upload that failed; ValueError: an answer nobody expects.
    return (*HfHubHTTPError.__bases__, HFValidationError, OSError, RuntimeError, ValueError)


def why_not_downloaded(repository: str, error: BaseException, hub: Mapping[str, Any]) -> str:
    """Why an adapter could not be downloaded, and what to do. `hub` holds the options given."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    nowhere = f"There is no folder {repository} here, and"
    match error:
        case GatedRepoError():
            return gated(repository)
        case RepositoryNotFoundError():
            return f"{nowhere} no repository {repository} on the hub that is open to you. {_if_private(hub)}"
        case RevisionNotFoundError():
            return f"The repository {repository} on the hub has no revision {hub.get('revision')!r}."
        case HFValidationError():
            return f"{nowhere} {repository!r} is not a hub id (user/name)."
        case LocalEntryNotFoundError() if hub.get("local_files_only"):
            place = hub.get("cache_dir") or constants.HF_HUB_CACHE
            return f"{nowhere} it is not in the cache {place}. Without local_files_only=True it would be downloaded."
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"{nowhere} it is not in the cache {hub.get('cache_dir') or constants.HF_HUB_CACHE}. HF_HUB_OFFLINE is "
                "set, so nothing is downloaded: unset it."
            )
        case _ if constants.HF_HUB_OFFLINE:
            return f"{repository} cannot be downloaded: HF_HUB_OFFLINE is set. Unset it."
    reason = _of_connection(_root(error))
    without = " Without a connection, name a folder that holds the adapter." if _NO_CONNECTION in reason else ""
    return f"{nowhere} it could not be downloaded from the hub: {reason}{without}"


def why_not_pushed(repository: str, error: BaseException, hub: Mapping[str, Any]) -> str:
    """Why nothing was written to a repository, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    not_pushed = f"Not pushed to {repository}:"
    status = _status(error)
    if constants.HF_HUB_OFFLINE:
        return f"{not_pushed} HF_HUB_OFFLINE is set. Unset it."
    match error:
        case GatedRepoError():
            return f"{not_pushed} {gated(repository)}"
        case HFValidationError():
            return f"{not_pushed} {repository!r} is not a hub id (user/name)."
        case RevisionNotFoundError():
            return f"{not_pushed} the repository has no revision {hub.get('revision')!r}."
        case LocalTokenNotFoundError():
            return f"{not_pushed} the hub does not know who you are: {_LOG_IN}."
        case _ if status == 401 and not _has_token(hub):
            return f"{not_pushed} the hub does not know who you are: {_LOG_IN}."
        case RepositoryNotFoundError():
            return f"{not_pushed} there is no such repository, or your token has no access to it."
        case _ if status == 403:
            return (
                f"{not_pushed} your token may not write there. Is it a write token, and is the name before the slash "
                "yours or your organisation's? create_pr=True proposes the files to the owner instead."
            )
    return f"{not_pushed} {_of_connection(_root(error))}"


def gated(repository: str) -> str:
    """What to do about a repository whose owner lets people in one by one."""
    from huggingface_hub import constants

    return (
        f"{repository} is gated: ask for access at {constants.ENDPOINT}/{repository}, then {_LOG_IN}, "
        "of the account that was let in."
    )


def _if_private(hub: Mapping[str, Any]) -> str:
    if _has_token(hub):
        return "If it is private, the account of your token has no access to it."
    return f"If it is private, {_LOG_IN}."


def _has_token(hub: Mapping[str, Any]) -> bool:
    from huggingface_hub import get_token

    given = hub.get("token")
    return bool(given) if given not in (None, True) else get_token() is not None


def _of_connection(error: BaseException) -> str:
    """What an error of the network, the hub itself or this machine's disk means."""
    from huggingface_hub import constants

    status, reason = _status(error), _first_line(error)
    if status == 401:
        return f"the token is not valid: {_LOG_IN}."
    if status == 403:
        return f"your token has no right to it ({reason})."
    if status == 429:
        return "the hub was asked too often. Wait a few minutes; with a token the limit is higher."
    if status is not None and status >= 500:
        return f"the hub answers {status}. Try again later."
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"{error.strerror or reason}."
    if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__ or isinstance(error, ConnectionError):
        return f"{constants.ENDPOINT} {_NO_CONNECTION} ({reason}). Check the connection."
    return reason if reason.endswith((".", "!", "?")) else f"{reason}."


def _root(error: BaseException) -> BaseException:
    """The error that the hub's library wrapped in a general one."""
    wrapped = error.__cause__
    known = _status(error) is not None or isinstance(error, OSError) and error.errno is not None
    return error if known or wrapped is None else _root(wrapped)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
