"""The Hugging Face Hub: upload a result, check before the training that it will be possible, explain failed downloads.

Tokens come from the environment or from Kaggle's secrets, and are never printed or written.
"""

from __future__ import annotations

import errno
import importlib.util
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from common import smollm2
from common.config import BaseConfig
from common.errors import UserError, causes

ATTEMPTS = 4
BACKOFF_SECONDS = 2.0  # doubles with every attempt
LONGEST_WAIT = 300.0  # seconds; a Retry-After above it is not waited for
SET_TOKEN = (
    "set HF_TOKEN (on Kaggle: the secret HF_TOKEN, attached to the notebook) "
    "to a write token from https://huggingface.co/settings/tokens"
)


def token() -> str | None:
    """The Hub token: HF_TOKEN, a login on this machine, or Kaggle's secret HF_TOKEN; None where there is none."""
    if found := huggingface_hub.get_token():
        return found
    try:
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret("HF_TOKEN") or None
    except Exception:  # not on Kaggle, no such secret, or no internet: its client raises something else for each
        return None


def check_can_push(cfg: BaseConfig) -> None:
    """Find out before the training whether its result can be uploaded at the end; does nothing without `hub.repo_id`.

    Raises `UserError` for a malformed `hub.repo_id`, no token, an invalid one, or one that may not write there.
    A Hub that does not answer is only a warning: it may be back by then.
    """
    repo_id = cfg.hub.repo_id
    if not repo_id:
        return
    where = f"hub.repo_id={repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{where} is not a repository's name, owner/name: {_first_line(error)}") from None
    if "/" not in repo_id:
        raise UserError(f"{where} needs its owner: write it as owner/{repo_id}")
    secret = token()
    if not secret:
        raise UserError(f"{where}, but there is no token: {SET_TOKEN}, or leave hub.repo_id empty")
    try:
        account = HfApi(token=secret).whoami()
    except Exception as error:
        if _status(error) in (401, 403):
            raise UserError(f"{where}, but the Hub does not accept the token: {SET_TOKEN}") from None
        print(f"warning: {where} could not be checked, training continues: {_first_line(error)}", file=sys.stderr)
        return
    if not _may_write(account, repo_id):
        raise UserError(f"{where}, but the token of {account['name']} may not write there: {SET_TOKEN}")


def push_to_hub(cfg: BaseConfig, run_dir: Path, folder: Path, *, path_in_repo: str = "") -> str | None:
    """Upload `folder` to `hub.repo_id` in one commit, creating that repository where it does not exist; return its URL.

    Network errors, 429 and 5xx are retried. Never raises: what went wrong, and the command that repeats the upload, are
    printed, and None is returned.
    """
    repo_id = cfg.hub.repo_id
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _upload(cfg, run_dir, folder, path_in_repo)
            except Exception as error:
                wait = _seconds_to_wait(error, attempt)
                if wait is None:
                    raise
                print(
                    f"upload to {repo_id}: {_first_line(error)}; again in {wait:.0f} s ({attempt} of {ATTEMPTS})",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(wait)
    except Exception as error:  # whatever it is, the trained model is on the disk and the run is a good one
        print(
            f"warning: {folder} was not uploaded to {repo_id}: {_why_not_uploaded(error)}. "
            f"To repeat it: {_upload_command(cfg, folder, path_in_repo)}",
            file=sys.stderr,
            flush=True,
        )
    return None


def explain_hub_error(error: Exception, kind: str, name: str) -> UserError:
    """What a failed download of `name` means to the user, in one line; `kind` is `model` or `dataset`.

    `error` may come from huggingface_hub, transformers or datasets: they wrap each other's errors, so the causes count.
    """
    chain = list(causes(error))
    text = "\n".join(f"{type(e).__name__}: {e}" for e in chain)
    if kind == "model":
        key, page, local = "model", f"{constants.ENDPOINT}/{name}", "model.name may also be a local folder"
    else:
        key, page, local = "data", f"{constants.ENDPOINT}/datasets/{name}", "data.name may also be a local file"
    where = f"{key}.name={name}"

    denied = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.EROFS, errno.EACCES)), None)
    if denied and denied.filename:
        return UserError(
            f"{where}: {denied.filename} cannot be written or read ({denied.strerror}): downloads are cached below "
            f"HF_HOME, set it to a folder of yours"
        )
    if any(isinstance(e, GatedRepoError) for e in chain) or "is a gated dataset" in text:
        if token():
            return UserError(f"{where} is gated, and your token's account has no access yet: ask for it at {page}")
        return UserError(f"{where} is gated: ask for access at {page}, then set HF_TOKEN to a token of that account")
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return UserError(f"{where} has no such revision: set model.revision to one that is listed at {page}/tree/main")
    if any(isinstance(e, RepositoryNotFoundError) for e in chain) or "DatasetNotFoundError" in text:
        private = "private to others than your token's account" if token() else "private, which needs HF_TOKEN"
        return UserError(f"{where} is not on the Hub: misspelt, or {private}; {local}")
    if any(isinstance(e, HFValidationError) for e in chain):
        return UserError(f"{where} is neither a name on the Hub (owner/name) nor something on this disk")
    if _status(error) == 401:
        return UserError(f"{where}: the Hub does not accept the token: put a valid one in HF_TOKEN, or unset it")
    if constants.HF_HUB_OFFLINE:
        return UserError(f"{where} is not in the cache, and HF_HUB_OFFLINE forbids the download: unset it; {local}")
    if any(map(_is_temporary, chain)) or "LocalEntryNotFoundError" in text:
        return UserError(
            f"{where} cannot be downloaded: no answer from {constants.ENDPOINT}, check the network (on Kaggle: "
            f"Settings → Internet); {local}"
        )
    return UserError(f"{where} cannot be loaded: {_first_line(error)}")


def is_hub_id(name: str) -> bool:
    """Whether a model or dataset name is an id on the Hub, not embedded (tiny:…, smollm2, pydoc) or a local path."""
    if name in ("pydoc", smollm2.NAME) or name.startswith("tiny:") or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _upload(cfg: BaseConfig, run_dir: Path, folder: Path, path_in_repo: str) -> str:
    api = HfApi(token=token())
    repo = api.create_repo(cfg.hub.repo_id, private=cfg.hub.private, exist_ok=True)
    print(f"uploading {folder} to {repo}", flush=True)
    api.upload_folder(
        repo_id=cfg.hub.repo_id,
        folder_path=folder,
        path_in_repo=path_in_repo or None,
        commit_message=f"Upload {folder.name} of run {run_dir.name}",
    )
    return str(repo)


def _upload_command(cfg: BaseConfig, folder: Path, path_in_repo: str) -> str:
    client = "hf" if importlib.util.find_spec("huggingface_hub.cli") else "huggingface-cli"  # its name before 0.34
    private = ["--private"] if cfg.hub.private else []
    return shlex.join([client, "upload", cfg.hub.repo_id, str(folder.resolve()), path_in_repo or ".", *private])


def _why_not_uploaded(error: Exception) -> str:
    status = _status(error)
    if not token():
        return f"there is no token; {SET_TOKEN}"
    if status == 401:
        return f"the Hub does not accept the token; {SET_TOKEN}"
    if status in (403, 404):
        return f"the token may not write there; {SET_TOKEN}"
    return _first_line(error)


def _seconds_to_wait(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt, or None where another one makes no sense."""
    if attempt == ATTEMPTS or constants.HF_HUB_OFFLINE or not any(map(_is_temporary, causes(error))):
        return None
    headers = next((r.headers for e in causes(error) if (r := getattr(e, "response", None)) is not None), {})
    asked = headers.get("Retry-After", "")  # a number of seconds; the Hub sends no dates
    wait = float(asked) if asked.isdigit() else BACKOFF_SECONDS * 2 ** (attempt - 1)
    return wait if wait <= LONGEST_WAIT else None


def _may_write(account: dict[str, Any], repo_id: str) -> bool:
    """Whether the answer of `whoami` allows an upload to `repo_id`; in doubt, yes."""
    owner = repo_id.partition("/")[0]
    access = account.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        return False
    scoped = access.get("fineGrained", {}).get("scoped", [])
    if scoped or access.get("role") == "fineGrained":
        return any(
            "repo.write" in scope.get("permissions", []) and scope.get("entity", {}).get("name") in (owner, repo_id)
            for scope in scoped
        )
    return owner in (account.get("name"), *(group.get("name") for group in account.get("orgs", [])))


def _status(error: BaseException) -> int | None:
    """The HTTP status that `error` or a cause of it carries."""
    return next((r.status_code for e in causes(error) if (r := getattr(e, "response", None)) is not None), None)


def _is_temporary(error: BaseException) -> bool:
    """Whether `error` is no answer, or one that asks to come back: 429 or 5xx."""
    if (response := getattr(error, "response", None)) is not None:
        return response.status_code == 429 or response.status_code >= 500
    # The Hub's client is built on requests, httpx or httpx2, by its version: none of them may be imported here.
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in ("requests", "urllib3", "httpx", "httpx2")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
