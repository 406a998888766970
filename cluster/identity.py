"""Who this machine is, whom it trusts, and the TLS credentials that follow from both."""

import contextlib
import datetime
import hashlib
import json
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import filelock
import grpc
import platformdirs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from ..runtime.files import replacing
from .errors import ClusterError, ProtocolError

MOST_NAME = 64
"""Bytes, or of a name that is no more than shown, characters."""
MOST_TEXT = 1000
"""Characters of a reason that is shown."""
OFF_DATE = "has a certificate that holds"
_MOST_PEM_BYTES = 4096
_LOCK_SECONDS = 10.0
_BEGIN = b"-----BEGIN CERTIFICATE-----"
_LIFE = datetime.timedelta(days=3652)
_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Where identity and peers are kept unless a folder is given."""
    return platformdirs.user_config_path("localreason", appauthor=False) / "cluster"


def is_name(text: object) -> bool:
    """Whether this can be the name of a machine: printable, not blank, at most 64 bytes in UTF-8, as X.509 has it."""
    return isinstance(text, str) and text.isprintable() and text.strip() == text and 0 < len(text.encode()) <= MOST_NAME


def shown(text: str, n: int) -> str:
    """The first `n` characters of another machine's text, without those that would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:n])


def fingerprint(pem: bytes) -> str:
    """SHA-256 of the certificate's DER, in hex. Raises ProtocolError."""
    return _parse(pem).fingerprint(hashes.SHA256()).hex()


def peer_id(pem: bytes) -> str:
    """The id of the certificate's machine: 16 hex digits of its public key's SHA-256. Raises ProtocolError."""
    return _id(_parse(pem).public_key())


def peer_name(pem: bytes) -> str:
    """The name that the certificate's machine gave itself. Raises ProtocolError."""
    try:
        names = _parse(pem).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except Exception as error:
        raise ProtocolError("the certificate's subject cannot be read; update localreason there") from error
    name = names[0].value if len(names) == 1 else ""
    if not is_name(name):
        raise ProtocolError(
            f"the certificate's name {name[:80]!r} is not printable text of 1 to 64 bytes; rename there"
        )
    return str(name)


def off_date(pem: bytes) -> str:
    """What a machine has whose certificate does not hold by this machine's clock, "" where it does. Raises
    ProtocolError."""
    certificate, now = _parse(pem), datetime.datetime.now(datetime.UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if start <= now <= end:
        return ""
    return (
        f"{OFF_DATE} from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, and by the clock here "
        f"it is {now:%Y-%m-%d %H:%M}; set the clock that is wrong, delete identity.pem where it was made by such a "
        "clock, and pair again"
    )


def check_certificate(pem: bytes) -> bytes:
    """The one certificate of `pem` and nothing else, if it is such as localreason makes. Raises ProtocolError."""
    certificate, name = _parse(pem), peer_name(pem)
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ProtocolError(f"the key of {name!r} is not of EC P-256, the only kind in use; update localreason there")
    try:
        certificate.verify_directly_issued_by(certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception as error:
        raise ProtocolError(f"the certificate of {name!r} is not self-signed for one machine; pair again") from error
    if names.get_values_for_type(x509.DNSName) != [_host(_id(key))]:
        raise ProtocolError(f"the certificate of {name!r} is not made out to its own key; pair again")
    return certificate.public_bytes(serialization.Encoding.PEM)


def _parse(pem: bytes) -> x509.Certificate:
    if len(pem) > _MOST_PEM_BYTES:
        raise ProtocolError(f"a certificate of {len(pem)} bytes is over the limit of {_MOST_PEM_BYTES}; send only one")
    try:
        found = x509.load_pem_x509_certificates(pem)
        found[0].public_key()
    except Exception as error:  # cryptography raises many kinds for what it cannot read, some of them plain Exceptions
        raise ProtocolError(f"{pem[:20]!r}... is not a certificate in PEM; update localreason there") from error
    if len(found) != 1:
        raise ProtocolError(f"{len(found)} certificates came where 1 is allowed; update localreason there")
    return found[0]


def _id(key: CertificatePublicKeyTypes) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()[:16]


def _host(id: str) -> str:
    return f"{id}.localreason.internal"


@dataclass(frozen=True, slots=True)
class Identity:
    """This machine's key and self-signed certificate."""

    name: str
    id: str
    certificate: bytes  # PEM
    key: bytes = field(repr=False)  # PEM; leaves this machine never, so logs do not show it
    folder: Path

    @classmethod
    def load(cls, folder: Path | None = None, name: str | None = None) -> "Identity":
        """The identity kept in `folder`, made on first use, and only then named `name`. Raises ClusterError."""
        folder = folder or default_folder()
        file = folder / "identity.pem"
        if name is not None and not is_name(name):
            raise ClusterError(f"the name {name[:80]!r} is not printable text of 1 to 64 bytes; give another")
        with _locked(file):
            if not file.exists():
                host = socket.gethostname()[:64].strip()
                _write(file, _make(name or (host if is_name(host) else "unnamed")))
            return cls._read(file)

    @classmethod
    def _read(cls, file: Path) -> "Identity":
        try:
            data = file.read_bytes()
            mark = data.index(_BEGIN)
            key, pem = data[:mark], check_certificate(data[mark:])
            private = serialization.load_pem_private_key(key, None)
            if private.public_key() != _parse(pem).public_key():
                raise ValueError("key and certificate do not belong together")
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm, ProtocolError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ClusterError(f"the identity {file} cannot be read: {reason}; delete it and pair again") from error
        return cls(peer_name(pem), peer_id(pem), pem, key, file.parent)


def _make(name: str) -> bytes:
    """A new key and its certificate. In one file, so that a crash cannot leave a key with another's certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # the clocks of two machines differ
        .not_valid_after(now + _LIFE)
        # Two machines may have one name: the verifier then tells their certificates apart by the key identifiers.
        .add_extension(public, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(public), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_host(_id(key.public_key())))]), critical=False)
    )
    form, open_ = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, form, open_)
    return pem + certificate.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other processes from changing `file`; its folder is made, for this user only."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(f"{file}.lock", timeout=_LOCK_SECONDS):
            yield
    except filelock.Timeout as error:
        raise ClusterError(f"{file} is locked by another process for {_LOCK_SECONDS:g} s; end that process") from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClusterError(f"{file} cannot be used: {reason}; give another folder or correct its rights") from error


def _write(file: Path, data: bytes) -> None:
    """Write the file, readable for this user only."""
    with replacing(file, 0o600) as part:
        part.write_bytes(data)


@dataclass(frozen=True, slots=True)
class Peer:
    """A machine that was paired with this one."""

    id: str
    name: str
    certificate: bytes  # PEM
    paired_at: str  # ISO 8601, UTC
    address: str  # where it was met, as host:port; a hint, for addresses change


class Peers:
    """The paired machines, in `peers.json`; read anew when another process has changed it. Safe in any thread."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = (folder or default_folder()) / "peers.json"
        self._cached: tuple[object, dict[str, Peer]] = (None, {})

    def add(self, certificate: bytes, address: str = "") -> Peer:
        """Trust the certificate from now on; one of the same id is replaced. Raises ClusterError."""
        pem = check_certificate(certificate)
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        peer = Peer(peer_id(pem), peer_name(pem), pem, at, address)
        with _locked(self._file):
            self._save({**self._load(), peer.id: peer})
        return peer

    def remove(self, name_or_id: str) -> Peer:
        """Trust this machine no more. Raises ClusterError if none or several have the name."""
        with _locked(self._file):
            peer = self.find(name_or_id)
            self._save({id: other for id, other in self._load().items() if id != peer.id})
        return peer

    def find(self, name_or_id: str) -> Peer:
        """The machine of this id, or the only one of this name. Raises ClusterError."""
        peers = self._load()
        if name_or_id in peers:
            return peers[name_or_id]
        found = [peer for peer in peers.values() if peer.name == name_or_id]
        if len(found) > 1:
            ids = ", ".join(peer.id for peer in found)
            raise ClusterError(f"{len(found)} paired machines are named {name_or_id!r}; give one of the ids {ids}")
        if not found:
            known = ", ".join(sorted(peer.name for peer in peers.values())) or "none"
            raise ClusterError(f"no paired machine has the name or id {name_or_id[:80]!r}; paired are: {known}")
        return found[0]

    def list(self) -> tuple[Peer, ...]:
        """All paired machines, by name. Raises ClusterError."""
        return tuple(sorted(self._load().values(), key=lambda peer: (peer.name, peer.id)))

    def certificates(self) -> Sequence[bytes]:
        """What `server_credentials` takes as `trusted`. Raises ClusterError."""
        return [peer.certificate for peer in self.list()]

    def _load(self) -> dict[str, Peer]:
        try:
            state = self._file.stat()
            stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
            cached, peers = self._cached
            if cached != stamp:
                rows = json.loads(self._file.read_bytes())
                peers = {id: Peer(**{**row, "certificate": row["certificate"].encode()}) for id, row in rows.items()}
                self._cached = (stamp, peers)  # in one step, for other threads
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ClusterError(f"{self._file} cannot be read: {error}; delete it and pair again") from error
        return peers

    def _save(self, peers: dict[str, Peer]) -> None:
        rows = {id: {**asdict(peer), "certificate": peer.certificate.decode()} for id, peer in peers.items()}
        _write(self._file, json.dumps(rows, indent=2, ensure_ascii=False).encode())


def server_credentials(identity: Identity, trusted: Callable[[], Sequence[bytes]]) -> grpc.ServerCredentials:
    """Credentials that admit whom `trusted` names at the time of each handshake, and otherwise nobody."""
    # An empty list of roots must not come to mean "no check": this certificate's key exists nowhere.
    made = _make("nobody")
    nobody = made[made.index(_BEGIN) :]

    def configuration() -> grpc.ServerCertificateConfiguration:
        try:
            roots = b"".join(map(check_certificate, trusted()))
        except ClusterError as error:  # gRPC would go on with the roots of before
            _log.error("nobody is admitted: %s", error)
            roots = b""
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], roots or nobody)

    return grpc.dynamic_ssl_server_credentials(configuration(), configuration, require_client_authentication=True)


def channel_credentials(identity: Identity, peer_pem: bytes) -> grpc.ChannelCredentials:
    """Credentials for a channel to the machine of this certificate and no other. Raises ProtocolError."""
    return grpc.ssl_channel_credentials(check_certificate(peer_pem), identity.key, identity.certificate)


def channel_options(peer_pem: bytes) -> list[tuple[str, str]]:
    """The options that go with `channel_credentials`: the name to expect in place of the address."""
    return [("grpc.ssl_target_name_override", _host(peer_id(peer_pem)))]
