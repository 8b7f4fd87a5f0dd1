"""A model folder to the hub. The token is the user's own login (`hf auth login`, or HF_TOKEN)."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from pref.files.console import UserError, first_line

Result = TypeVar("Result")
# Those of the library that huggingface_hub speaks HTTP with, which is another in each version.
UNREACHABLE = (OSError, *HfHubHTTPError.__bases__)


def check_push(repository: str, private: bool) -> None:
    """Make the repository if it is not there. Raises UserError if nothing could be uploaded to it:
    nobody is logged in, the hub is out of reach, or it is somebody else's.
    """
    asked(lambda: HfApi().create_repo(repository, private=private, exist_ok=True), repository)
    # A repository that was there is no proof of a right to write.
    user = asked(lambda: HfApi().whoami(), repository)
    owner = repository.partition("/")[0] if "/" in repository else user["name"]
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in owners:
        raise UserError(
            f"--push {repository}: {user['name']} is neither {owner} nor a member of it; give "
            f"{user['name']}/NAME, or log in as somebody who may write there"
        )


def push(folder: Path, repository: str) -> str:
    """Upload `folder` and return the address. Files that are there already are not sent again."""
    message = "A LoRA adapter merged into its base"
    found = asked(
        lambda: HfApi().upload_folder(
            folder_path=folder, repo_id=repository, commit_message=message
        ),
        repository,
        f"; {folder} is complete: the same command goes on",
    )
    return str(found)


def asked(call: Callable[[], Result], repository: str, more: str = "") -> Result:
    """What the hub answers to `call`. Raises UserError where it refuses or is out of reach."""
    place = f"--push {repository}"
    try:
        return call()
    except LocalTokenNotFoundError:
        raise UserError(f"{place}: nobody is logged in; run `hf auth login` first{more}") from None
    except HFValidationError as error:
        raise UserError(f"{place}: {first_line(error)}; give USER/NAME{more}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        reason = {401: "the login is not valid", 403: "this login may not write there"}.get(status)
        reason = reason or f"the hub answers {status} ({first_line(error)})"
        raise UserError(
            f"{place}: {reason}; log in as somebody who may (`hf auth login`, with a token that "
            f"can write){more}"
        ) from None
    except UNREACHABLE as error:
        raise UserError(f"{place}: the hub cannot be reached ({first_line(error)}){more}") from None
