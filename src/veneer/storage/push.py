"""A folder to the Hugging Face hub, in one commit."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterFileError, check_kind
from veneer.storage.card import CARD_FILE
from veneer.storage.hub import hub_api, is_hub_id
from veneer.storage.hub_errors import failures, why_not_pushed

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

PUSH_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
_OF_WHOLE_MODELS = (
    "max_shard_size",
    "safe_serialization",
    "variant",
    "save_peft_format",
    "save_original_format",
    "save_function",
)


def push_saved(
    save: Callable[[Path, str], None], repo_id: str, *, what: str = "adapter", **options: Any
) -> "CommitInfo":
    """Write files to an empty folder and upload it in one commit; the repository is made if there is none.

    save  called with the folder and the repository's full id. The README.md of the repository lies in the folder by
          then, so that it can be kept

    Nothing is asked to be written before `save` has returned. Options: see `PUSH_OPTIONS`. Raises AdapterFileError.
    """
    repository = _full_id(repo_id, options)
    shown = {name: options.get(name) for name in ("token", "revision")}
    with tempfile.TemporaryDirectory(prefix="veneer-push-") as place:
        folder = Path(place) / "adapter"
        folder.mkdir()
        if (card := _card_there(repository, options)) is not None:
            (folder / CARD_FILE).write_bytes(card)
        save(folder, repository)
        try:
            return _upload(folder, repository, {**options, "commit_message": options.get("commit_message") or what})
        except failures() as error:
            raise AdapterFileError(why_not_pushed(repository, error, shown)) from None


def less_of_whole_models(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that only shape a whole model's files."""
    return {name: value for name, value in options.items() if name not in _OF_WHOLE_MODELS}


def check_push_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of an upload among those of a caller of PEFT; what only shapes a whole model's files goes.

    Raises AdapterFileError naming those that do not exist.
    """
    given = less_of_whole_models(options)
    if unknown := sorted(set(given) - {*PUSH_OPTIONS, "repo_id", "tags"}):
        raise AdapterFileError(
            f"Unknown option {', '.join(unknown)}; to push there are repo_id, tags, {', '.join(PUSH_OPTIONS)}."
        )
    return given


def _full_id(repo_id: str, options: dict[str, Any]) -> str:
    """`user/name`, also for a name alone, which means the account of the token. Raises AdapterFileError."""
    check_kind(repo_id, str, "A repository of the hub (user/name)")
    if is_hub_id(repo_id):
        return repo_id
    if not is_hub_id(f"user/{repo_id}"):
        raise AdapterFileError(f"Not pushed: {repo_id!r} is not a hub id (user/name).")
    try:
        return f"{hub_api().whoami(token=options.get('token'))['name']}/{repo_id}"
    except failures() as error:
        raise AdapterFileError(why_not_pushed(repo_id, error, options)) from None


def _card_there(repository: str, options: dict[str, Any]) -> bytes | None:
    """The README.md that the repository has, in the revision that is written to or the main one."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with tempfile.TemporaryDirectory() as cache:  # the newest one, not what was downloaded before
        for revision in dict.fromkeys((options.get("revision"), None)):
            try:
                path = hub_api().hf_hub_download(
                    repository, CARD_FILE, revision=revision, token=options.get("token"), cache_dir=cache
                )
                return Path(path).read_bytes()
            except (RepositoryNotFoundError, RevisionNotFoundError):
                continue
            except failures() as error:
                if _is_no_such_file(error):
                    return None
                raise AdapterFileError(why_not_pushed(repository, error, options)) from None
    return None


def _is_no_such_file(error: BaseException) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _upload(folder: Path, repository: str, options: dict[str, Any]) -> "CommitInfo":
    from huggingface_hub import CommitOperationAdd

    api, token, revision = hub_api(), options.get("token"), options.get("revision")
    api.create_repo(repository, private=options.get("private"), token=token, exist_ok=True)
    if revision is not None and not revision.startswith("refs/pr/") and not options.get("create_pr"):
        api.create_branch(repository, branch=revision, token=token, exist_ok=True)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return api.create_commit(
        repository,
        [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files],
        commit_message=options["commit_message"],
        commit_description=options.get("commit_description"),
        token=token,
        revision=revision,
        create_pr=bool(options.get("create_pr")),
    )
