"""A real S3 server on loopback (moto) that checks signatures and lets one account in."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import botocore.session
from botocore.exceptions import BotoCoreError

BUCKET = "fewshot"
POLICY = (
    '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
)


class ObjectStore(NamedTuple):
    """A running server with a bucket, and the keys of the one account that it knows."""

    endpoint: str
    key: str
    secret: str

    def client(self) -> Any:
        """A client with the account's keys."""
        return _client("s3", self.endpoint, self.key, self.secret)

    def names(self, prefix: str = "") -> list[str]:
        """The names of the bucket's objects."""
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"] for each in found.get("Contents", ())]

    def mount(self, folder: Path) -> Path:
        """Write the keys as Kubernetes mounts a secret: links into a folder that is swapped."""
        data = folder / "..2027_01_31"
        data.mkdir(parents=True)
        (folder / "..data").symlink_to(data.name)
        for name, value in {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
        }.items():
            (data / name).write_text(value)
            (folder / name).symlink_to(f"..data/{name}")
        return folder


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server in a process of its own: moto keeps one state for each process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        # Requests without an account, for making one; from then on signatures are checked.
        env=os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "4"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        iam = _client("iam", endpoint, "nobody", "nothing")
        _when_up(lambda: iam.create_user(UserName="team"))
        iam.put_user_policy(UserName="team", PolicyName="all", PolicyDocument=POLICY)
        keys = iam.create_access_key(UserName="team")["AccessKey"]
        store = ObjectStore(endpoint, keys["AccessKeyId"], keys["SecretAccessKey"])
        store.client().create_bucket(Bucket=BUCKET)
        yield store
    finally:
        server.terminate()
        server.wait()


def _client(service: str, endpoint: str, key: str, secret: str) -> Any:
    return botocore.session.get_session().create_client(
        service,
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    )


def _when_up(call: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            call()
            return
        except BotoCoreError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
