"""Kubernetes secrets that are mounted as files, and the stores' options that they stand for.

Never as environment variables: Kubeflow's launcher reads those too, and would use another store's
keys for its own.
"""

from pathlib import Path
from urllib.parse import urlsplit

DATA = Path("/etc/reptile/data")
"""Where the credentials of the DVC remote are mounted."""
GIT = Path("/etc/reptile/git")
"""Where the credentials of the git repository are mounted."""
WORK = Path("/etc/reptile/work")
"""Where the credentials of the store of unfinished training are mounted."""

OPTIONS = {
    "s3": {
        "AWS_ACCESS_KEY_ID": "access_key_id",
        "AWS_SECRET_ACCESS_KEY": "secret_access_key",
        "AWS_SESSION_TOKEN": "session_token",
        "AWS_ENDPOINT_URL": "endpointurl",
        "AWS_REGION": "region",
    },
    "gs": {"GOOGLE_APPLICATION_CREDENTIALS": "credentialpath"},
}
"""By a store's scheme: the keys of its secret, named as by Amazon's and Google's own tools, and the
options of a DVC remote that they stand for."""


def read_secret(folder: Path) -> dict[str, str]:
    """Return a mounted secret's values by their keys; empty if there is no such secret."""
    if not folder.is_dir():
        return {}
    files = [
        each for each in folder.iterdir() if each.is_file()
    ]  # links, beside Kubernetes' folders
    return {each.name: each.read_text(encoding="utf-8").strip() for each in files}


def remote_options(address: str, folder: Path) -> dict[str, str]:
    """Return what a secret says of a store, as options of a DVC remote.

    Args:
        address: of the store, such as `s3://bucket/folder`.
        folder: where the secret is mounted; nothing there leaves the credentials to the
            environment, as with accounts that are bound to the pod.
    """
    names = OPTIONS.get(urlsplit(address).scheme, {})
    values = read_secret(folder)
    options = {names[key]: value for key, value in values.items() if key in names and value}
    if "credentialpath" in options:  # a file's content in the secret, a file's path for DVC
        options["credentialpath"] = str(folder / "GOOGLE_APPLICATION_CREDENTIALS")
    return options


def configure_remotes(dvc_folder: Path, folder: Path) -> None:
    """Give a repository's remotes their credentials, in DVC's own file for that, config.local.

    What the repository says of a remote, such as its endpoint, is left as it is. The file can be
    read by its owner alone; the repository must be a temporary one.

    Args:
        dvc_folder: the repository's `.dvc`.
        folder: where the secret is mounted.
    """
    from dvc.config import Config

    config = Config(str(dvc_folder))
    options = {
        name: {
            option: value
            for option, value in remote_options(remote["url"], folder).items()
            if option not in remote
        }
        for name, remote in config["remote"].items()
    }
    if any(options.values()):
        (dvc_folder / "config.local").touch(mode=0o600)
        with config.edit("local") as local:
            local["remote"] = options
