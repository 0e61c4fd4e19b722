"""A certificate authority for the tests."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    """Issues certificates.

    Args:
        path: File to which its own certificate is written, PEM.
    """

    def __init__(self, path: Path) -> None:
        self._authority = trustme.CA()
        self.path = path
        self._authority.cert_pem.write_to_path(path)

    def issue(self, host: str, folder: Path) -> tuple[Path, Path]:
        """Write the certificate and the key of a server, PEM."""
        issued = self._authority.issue_cert(host)
        certificate, key = folder / f"{host}.pem", folder / f"{host}.key.pem"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return certificate, key
