"""Pushing to the Hugging Face hub: one commit, all of it or nothing. The token is the hub library's own business.

HF_TOKEN, `hf auth login`, HF_ENDPOINT and HF_HUB_OFFLINE hold, as for everything that uses that library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.training.sharing.repository import repository

#: seconds without a sign of life from the server after which a request is given up; the library waits for ever
TIMEOUT = 60.0


def check_access(name: str) -> None:
    """Raise `UserError` for a name that cannot be, and where there is no token; asks nobody."""
    try:
        repository(name)
    except ValueError as error:
        raise UserError(str(error), where=name) from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and nothing can be pushed", where=name, fix="unset it")
    if get_token() is None:
        raise UserError("there is no token for the Hugging Face hub", where=name,
                        fix="hf auth login, or set HF_TOKEN to a token that may write")


def push(files: Mapping[str, Path | bytes], name: str, *, private: bool = False, report: Reporter = SILENT) -> str:
    """Make the repository `owner/name` if there is none, and commit `files` to it; its address.

    `private`: a new one is made private, and one that is public is refused. Raises `UserError`.
    """
    check_access(name)
    api = HfApi(library_name="impasto")
    with report.phase(f"pushing to {name}"), _patient(name):
        made = api.create_repo(name, private=private or None, exist_ok=True)
        if private and api.model_info(name).private is False:
            raise UserError("is there already, and is public", where=name,
                            fix="make it private on the hub first, push without --private, or choose another name")
        operations = [CommitOperationAdd(place, content if isinstance(content, bytes) else str(content))
                      for place, content in files.items()]
        api.create_commit(name, operations, commit_message="Upload with Impasto")
    return str(made)


@contextmanager
def _patient(name: str) -> Iterator[None]:
    """Requests with a limit of time, and their failures in one line."""
    session = get_session()
    former = session.timeout
    session.timeout = TIMEOUT
    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(error, name) from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the library wraps what happens in its threads
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError) and not _timed_out(cause):
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, name) from error
        if _timed_out(cause):
            raise UserError(f"{constants.ENDPOINT} does not answer (waited {TIMEOUT:.0f} seconds)", where=name,
                            fix="try again later") from error
        raise UserError(f"could not be pushed ({_first_line(cause)})", where=name,
                        fix="check the connection, and try again") from error
    finally:
        session.timeout = former


def _refused(error: HfHubHTTPError, name: str) -> UserError:
    """What an answer of the server means, and what to do."""
    status, said = error.response.status_code, error.server_message or ""
    what, fix = {
        401: ("the hub does not know this token", "hf auth login again, or set another HF_TOKEN"),
        402: ("the hub asks for payment", "look at the account's plan and storage"),
        403: ("this token may not write there", "take a token with the right to write, or a name that is yours"),
        404: ("there is no such repository for this token", "check the owner's name"),
        409: ("the repository changed meanwhile", "try again"),
        413: ("the hub finds it too large", "look at the limits of the account"),
        429: ("the hub asks for a pause", "try again later"),
    }.get(status, (f"the hub failed ({status})", "try again later") if status >= 500 else
          (f"the hub refused ({status})", "see what it says"))
    told = f"{what} (it says: {' '.join(said.split())[:200]})" if said.strip() else what
    return UserError(told, where=name, fix=fix)


def _timed_out(error: BaseException) -> bool:
    """Whether a request was given up; the classes are those of the hub library's own HTTP library."""
    return "Timeout" in type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
