"""An S3 server on 127.0.0.1 (moto's), and one in front of it that refuses."""

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import boto3
from moto.server import ThreadedMotoServer

from flux2max_async.storage import ObjectStorage

CREDENTIALS = {"access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}


class S3Server:
    """An S3 server with an empty bucket, "pictures"."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)

    def __enter__(self) -> Self:
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stop()

    def create_bucket(self, name: str) -> None:
        self.client.create_bucket(Bucket=name)

    def storage(self, url: str, **options: Any) -> ObjectStorage:
        return ObjectStorage.from_url(url, **{"endpoint": self.url, **CREDENTIALS, **options})

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return the content of each object by its key."""
        found = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return {item["Key"]: self.client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read() for item in found}

    def uploads(self, bucket: str) -> list[str]:
        """Return the keys of the multipart uploads that were neither completed nor aborted."""
        return [upload["Key"] for upload in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


class RefusingServer:
    """A server that answers each request with an S3 error.

    Args:
        allow_uploads: How many multipart uploads may begin; the first is the probe of a storage that is opened.
    """

    def __init__(self, status: int, code: str, message: str, *, allow_uploads: int = 0) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        remaining = allow_uploads
        self.requests: list[tuple[str, str]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                nonlocal remaining
                requests.append((self.command, self.path))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if (self.command == "POST" and self.path.endswith("?uploads")) or self.path.endswith("?uploads="):
                    if remaining:
                        remaining -= 1
                        self.send(
                            200,
                            b"<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId>"
                            b"</InitiateMultipartUploadResult>",
                        )
                        return
                elif self.command == "DELETE":
                    self.send(204, b"")
                    return
                elif self.command in {"GET", "HEAD"} and allow_uploads:
                    self.send(404, b"")
                    return
                self.send(status, body)

            def send(self, code: int, content: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.answer)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def storage(self, url: str, **options: Any) -> ObjectStorage:
        return ObjectStorage.from_url(url, **{"endpoint": self.url, **CREDENTIALS, **options})
