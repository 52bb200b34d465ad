"""The README's example for several hosts, in three processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.postgres import PostgresServer
from support.s3 import S3Server

from flux2max_async.emulator import Emulator

README = Path(__file__).parents[2] / "README.md"
BUCKET = "readme-pictures"


def test_several_hosts(postgres: PostgresServer, tmp_path: Path) -> None:
    """Each of three hosts gets every outcome; each picture is paid for, downloaded and stored once."""
    section = README.read_text(encoding="utf-8").split("\n## On several hosts\n")[1]
    script = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    with S3Server() as s3, Emulator(seconds=0.5, spread=0.1, seed=1) as gateway:
        s3.create_bucket(BUCKET)
        environment = {
            **os.environ,
            "FLUX2MAX_API_KEY": gateway.api_key,
            "FLUX2MAX_BASE_URL": gateway.url,
            "DATABASE_URL": postgres.conninfo(),
            "PICTURES_URL": f"s3://{BUCKET}/herbarium",
            "AWS_ENDPOINT_URL": s3.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        hosts = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", script],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
            )
            for _ in range(3)
        ]  # fmt: skip
        outputs = [host.communicate(timeout=300) for host in hosts]
        downloads = [task.downloads for task in gateway.tasks.values()]

    assert [(host.returncode, error) for host, (_, error) in zip(hosts, outputs, strict=True)] == [(0, "")] * 3
    stored = [sorted(re.findall(rf"s3://{BUCKET}/herbarium/[^']+", output)) for output, _ in outputs]
    assert len(stored[0]) == 12
    assert stored[0] == stored[1] == stored[2]
    assert set(gateway.accepted.values()) == {1}
    assert downloads == [1] * 12
