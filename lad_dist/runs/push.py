"""Uploading an export to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from lad_dist.config.errors import UserError
from lad_dist.runs.run_folder import add_to_results, read_results
from lad_dist.utils import progress
from lad_dist.utils.text import one_line


def push_export(folder: Path, name: str, *, private: bool) -> str:
    """Upload the export of a complete run to the repository of that name, and return the repository's URL.

    A new repository is private where `private` says so. The model card says the name.

    Raises:
        UserError: The folder holds no complete run, or the hub cannot be reached or refuses the upload.
    """
    before = read_results(folder).get("export", {}).get("hub_name")
    hub = HfApi()
    try:
        url = hub.create_repo(name, private=private, exist_ok=True)
        add_to_results(folder, {"export": {"hub_name": url.repo_id}})  # the card that is uploaded says the name
        try:
            with progress.waiting(f"uploading {folder / 'export'}"):
                hub.upload_folder(
                    repo_id=url.repo_id, folder_path=folder / "export", commit_message="Upload by lad_dist"
                )
        except BaseException:
            add_to_results(folder, {"export": {"hub_name": before}})
            raise
    except HFValidationError:
        raise UserError(f"{name}: no name of a repository on the hub; name it USER/MODEL") from None
    except Exception as error:  # of the network, HF_HUB_OFFLINE, a missing token, a repository of others
        raise UserError(f"{name}: cannot be uploaded to the hub ({one_line(error)}); see `hf auth login`") from None
    return str(url)
