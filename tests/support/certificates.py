"""Certificates for servers of tests, which sign themselves: whoever trusts one trusts its server."""

import ssl
import subprocess
from pathlib import Path

import attrs


@attrs.frozen
class Certificate:
    """A certificate and its key, in one file."""

    path: Path

    @classmethod
    def create(cls, folder: Path, *names: str) -> "Certificate":
        """Create a certificate for DNS names and, as "IP:127.0.0.1", addresses."""
        path, key = folder / f"{names[0]}.pem", folder / f"{names[0]}.key"
        alternatives = ",".join(name if name.startswith("IP:") else f"DNS:{name}" for name in names)
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={alternatives}"]
        subprocess.run([*command, "-keyout", str(key), "-out", str(path)], check=True, capture_output=True)
        path.write_bytes(path.read_bytes() + key.read_bytes())
        return cls(path)

    @property
    def of_server(self) -> ssl.SSLContext:
        """The context of a server that has it."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path)
        return context

    @property
    def of_client(self) -> ssl.SSLContext:
        """The context of a client that trusts it."""
        return ssl.create_default_context(cafile=str(self.path))
