"""A bucket behind moto's S3 server, which runs in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.services.programs import Missing


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    name: str
    endpoint: str

    def environment(self) -> dict[str, str]:
        """Return the environment variables that a client of the bucket needs."""
        return {
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }


@contextmanager
def s3_server() -> Iterator[str]:
    """Start a server. Yields http://127.0.0.1:PORT."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise Missing(f"moto's server is not installed ({error})") from error
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(endpoint: str) -> Bucket:
    """Create an empty bucket with a unique name."""
    import boto3

    name = f"lorry-{os.urandom(6).hex()}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket=name)
    return Bucket(name=name, endpoint=endpoint)
