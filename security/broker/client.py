"""The key broker as a shard, an owner or a client sees it. Blocking; safe to use from threads.

Nothing that comes over the network is believed: every document is verified from the owner's key,
which the caller pins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, cast

import grpc
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from security.attestation.evidence import Evidence
from security.broker import broker_pb2, broker_pb2_grpc
from security.broker.admission import MAX_NOTE_LENGTH, MAX_NOTES
from security.broker.challenge import Challenge
from security.broker.documents import Installation, open_certificate, open_installation
from security.broker.members import open_secret
from security.broker.nonces import NONCE_BYTES
from security.broker.revocation import Revocations
from security.broker.service import CODE_METADATA, KEEPALIVE_OPTIONS
from security.broker.store import printable
from security.errors import AdmissionRefused, BrokerReplyInvalid, BrokerUnreachable, SecurityError

CALL_TIMEOUT_S = 15.0
"""Deadline of one call."""

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 3.0
_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 3000),
    # A proxy from the environment would see, and could stop, everything.
    ("grpc.enable_http_proxy", 0),
)

ReplyT = TypeVar("ReplyT")


class Stream(Protocol):
    """A stream of watch replies that is being received."""

    def __iter__(self) -> Iterator[broker_pb2.WatchReply]: ...

    def cancel(self) -> bool:
        """Ends the stream, from any thread."""


class _FailedCall(Protocol):
    """What every RpcError of a call also is."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...


class BrokerClient:
    """A connection to a broker, made when it is first needed and again when it is lost.

    Every method raises `BrokerUnreachable` if there is no answer within `CALL_TIMEOUT_S`, and
    `AdmissionRefused` with the broker's code and reason if the broker refuses.

    Args:
        address: "host:port".
        owner_public: the pinned key of the owner (32 bytes).
    """

    def __init__(self, address: str, owner_public: bytes) -> None:
        self.address = address
        self._owner_public = owner_public
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = broker_pb2_grpc.KeyBrokerStub(self._channel)

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in progress end with BrokerUnreachable."""
        self._channel.close()

    def identity(self) -> bytes | None:
        """The broker's public key as certified by the owner; None before the first installation.

        Raises:
            SignatureInvalid: the certificate is not this owner's.
        """
        reply: broker_pb2.IdentityReply = self._call(
            lambda: self._stub.Identity(broker_pb2.IdentityRequest(), timeout=CALL_TIMEOUT_S)
        )
        if not reply.certificate:
            return None
        return open_certificate(reply.certificate, self._owner_public)

    def install(self, installation: Installation) -> int:
        """Installs signed documents; returns the generation that is installed now."""
        request = broker_pb2.InstallRequest(
            policy=installation.policy,
            template=installation.template,
            manifest=installation.manifest,
            enrolments=installation.enrolments,
            certificate=installation.certificate,
        )
        reply: broker_pb2.InstallReply = self._call(
            lambda: self._stub.Install(request, timeout=CALL_TIMEOUT_S)
        )
        return reply.generation

    def revoke(self, document: bytes) -> int:
        """Installs a signed list of revocations; returns the generation that holds now."""
        request = broker_pb2.RevokeRequest(document=document)
        reply: broker_pb2.RevokeReply = self._call(
            lambda: self._stub.Revoke(request, timeout=CALL_TIMEOUT_S)
        )
        return reply.generation

    def revocations(self) -> Revocations:
        """What the broker says is revoked; signed by the owner, but perhaps an older list.

        Raises:
            SecurityError: the list is not this owner's.
        """
        request = broker_pb2.GetRevocationsRequest()
        reply: broker_pb2.GetRevocationsReply = self._call(
            lambda: self._stub.GetRevocations(request, timeout=CALL_TIMEOUT_S)
        )
        return Revocations.open(reply.document, self._owner_public)

    def challenge(self, instance: str, role: str) -> Challenge:
        """Asks for a nonce and verifies the documents that come with it.

        Raises:
            SecurityError: the documents are not this owner's or do not belong together.
        """
        request = broker_pb2.ChallengeRequest(instance=instance, role=role)
        reply: broker_pb2.ChallengeReply = self._call(
            lambda: self._stub.Challenge(request, timeout=CALL_TIMEOUT_S)
        )
        if len(reply.nonce) != NONCE_BYTES:
            raise BrokerReplyInvalid(
                f"challenge: expected a nonce of {NONCE_BYTES} bytes, found {len(reply.nonce)}"
            )
        documents = open_installation(
            Installation(reply.policy, reply.template, reply.manifest, b"", reply.certificate),
            self._owner_public,
        )
        return Challenge(
            instance=instance,
            role=role,
            nonce=reply.nonce,
            policy=documents.policy,
            policy_digest=documents.policy_digest,
            template=documents.template,
            template_digest=documents.template_digest,
            manifest=documents.manifest,
            manifest_digest=documents.manifest_digest,
            broker_key=documents.broker_key,
        )

    def admit(
        self,
        challenge: Challenge,
        shard_private_key: X25519PrivateKey,
        *,
        link_address: str,
        ingress_address: str,
        evidence: Evidence,
        observed_manifest_digest: str,
        notes: Sequence[str] = (),
        device_evidence: bytes = b"",
        region: str | None = None,
    ) -> bytes:
        """Presents evidence; returns the member secret.

        Args:
            challenge: a fresh challenge.
            shard_private_key: made for this admission.
            link_address: "host:port" where peers connect.
            ingress_address: "host:port" where requests come in; "" except for the first stage.
            evidence: over ``challenge.binding(...).report_data()``.
            observed_manifest_digest: what the shard found on its disk.
            notes: what differs from the manifest, for the broker's log.
            device_evidence: what went into the binding; b"" for none.
            region: declared region of this node, if known.

        Raises:
            AdmissionRefused: with the code of the rule that does not hold.
            BrokerReplyInvalid: the secret is not sealed to this shard's key.
        """
        shard_key = shard_private_key.public_key().public_bytes_raw()
        binding = challenge.binding(shard_key, observed_manifest_digest, device_evidence)
        request = broker_pb2.AdmitRequest(
            nonce=challenge.nonce,
            instance=challenge.instance,
            role=challenge.role,
            shard_key=shard_key,
            link_address=link_address,
            ingress_address=ingress_address,
            binding=broker_pb2.StatedBinding(
                nonce=binding.nonce,
                shard_key=binding.shard_key,
                role=binding.role,
                cluster=binding.cluster,
                instance=binding.instance,
                broker_key=binding.broker_key,
                policy_digest=binding.policy_digest,
                manifest_digest=binding.manifest_digest,
                gpu_evidence_digest=binding.gpu_evidence_digest,
            ),
            evidence_kind=evidence.kind,
            evidence=evidence.body,
            notes=[printable(note, MAX_NOTE_LENGTH) for note in notes[:MAX_NOTES]],
            device_evidence=device_evidence,
            region=region or "",
        )
        reply: broker_pb2.AdmitReply = self._call(
            lambda: self._stub.Admit(request, timeout=CALL_TIMEOUT_S)
        )
        return open_secret(
            reply.sealed_secret,
            shard_private_key,
            challenge.instance,
            challenge.role,
            challenge.nonce,
        )

    def get_roster(self, instance: str) -> bytes:
        """The serialised GetRosterReply of an instance, for `open_roster_reply`. Not verified."""
        request = broker_pb2.GetRosterRequest(instance=instance)
        reply: broker_pb2.GetRosterReply = self._call(
            lambda: self._stub.GetRoster(request, timeout=CALL_TIMEOUT_S)
        )
        return reply.SerializeToString()

    def retire(self, instance: str) -> None:
        """Has the broker forget an instance; stop its shards first, else they come back."""
        request = broker_pb2.RetireRequest(instance=instance)
        self._call(lambda: self._stub.Retire(request, timeout=CALL_TIMEOUT_S))

    def open_watch(self, request: broker_pb2.WatchRequest) -> Stream:
        """A member's stream of rosters; its errors are for `translated`."""
        stream: Stream = self._stub.Watch(request)
        return stream

    def renew_epoch(self, request: broker_pb2.RenewEpochRequest) -> None:
        """A member's word that an epoch is broken."""
        self._call(lambda: self._stub.RenewEpoch(request, timeout=CALL_TIMEOUT_S))

    def report(self, request: broker_pb2.ReportRequest) -> None:
        """A member's line for the log."""
        self._call(lambda: self._stub.Report(request, timeout=CALL_TIMEOUT_S))

    def _call(self, call: Callable[[], ReplyT]) -> ReplyT:
        try:
            return call()
        except grpc.RpcError as error:
            raise self.translated(error) from None
        except ValueError:  # what a closed channel raises
            raise BrokerUnreachable(f"broker at {self.address}: the client was closed") from None

    def translated(self, error: grpc.RpcError) -> SecurityError:
        """A refusal if the broker gave a code, otherwise BrokerUnreachable."""
        failed = cast(_FailedCall, error)  # grpc does not say so in its types
        details = printable(failed.details() or "")
        for name, value in failed.trailing_metadata() or ():
            if name == CODE_METADATA:
                return AdmissionRefused(
                    printable(str(value), 64), printable(failed.details() or "")
                )
        return BrokerUnreachable(
            f"broker at {self.address}: expected an answer within {CALL_TIMEOUT_S:.0f} s, found "
            f"{failed.code().name} ({details[:200]}); check that the broker "
            "runs and that this machine reaches it"
        )
